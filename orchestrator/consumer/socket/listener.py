"""The listening socket: how it comes to its path, and how it goes.

Invariants:

* It has its final mode from the first instant: the mode is that of the descriptor before it is bound, and the umask,
  which all threads share, is left alone.
* A path that somebody listens on is never taken over; what a dead daemon left behind is replaced. Two daemons that
  start at the same time take turns at this, by a lock on the directory.
* A directory that is made for it is open to the daemon's user alone.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import anyio

from orchestrator.errors import AlreadyRunning, StateError

__all__ = ["PRIVATE_MODE", "SHARED_MODE", "Listener", "listen"]

PRIVATE_MODE: Final = 0o600
SHARED_MODE: Final = 0o666
"""Where other users are allowed by name: who they are is looked at on every connection."""

BACKLOG: Final = 1024
"""A job's ranks connect at once; the kernel bounds it by ``net.core.somaxconn``."""

PROBE_S: Final = 1.0
"""For the answer of whoever listens; it comes at once, from the kernel."""

TURN_DEADLINE_S: Final = 5.0
TURN_RETRY_S: Final = 0.02
"""For another daemon that looks at the same directory: it needs milliseconds."""


class _NotOurTurn(Exception):
    """Another process has the directory's lock."""


@dataclass(frozen=True, slots=True)
class Listener:
    """A listening, non-blocking socket, and the device and inode of the file that is its address."""

    socket: socket.socket
    path: Path
    file: tuple[int, int]

    def close(self) -> None:
        """Stop listening; remove the file, unless somebody has put another in its place or is at it just now."""
        self.socket.close()
        with suppress(FileNotFoundError, _NotOurTurn), _turn(self.path.parent):
            if _identity(self.path) == self.file:
                self.path.unlink()


async def listen(path: Path, *, mode: int = PRIVATE_MODE) -> Listener:
    """A listening socket, in place of a stale one.

    Raises:
        AlreadyRunning: somebody listens there.
        StateError: the path cannot be bound.
    """
    with anyio.move_on_after(TURN_DEADLINE_S):
        while True:
            try:
                return await anyio.to_thread.run_sync(partial(_listen, path, mode))
            except _NotOurTurn:
                await anyio.sleep(TURN_RETRY_S)
    raise AlreadyRunning(f"another process holds a lock on {path.parent}; is another daemon starting there?")


def _identity(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino


def _listen(path: Path, mode: int) -> Listener:
    try:
        path.parent.mkdir(mode=0o711 if mode == SHARED_MODE else 0o700, parents=True, exist_ok=True)
        with _turn(path.parent):
            _remove_stale(path)
            return _bound(path, mode)
    except AlreadyRunning:
        raise
    except OSError as error:
        if isinstance(error, StateError):
            raise
        raise StateError(f"cannot listen on {path}: {error.strerror or error}") from error


def _bound(path: Path, mode: int) -> Listener:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        os.fchmod(listener.fileno(), PRIVATE_MODE)  # Linux gives the file at the path what this leaves
        listener.bind(str(path))
        if stat.S_IMODE(path.stat().st_mode) != mode:  # a shared socket, or an umask that takes even the owner's rights
            path.chmod(mode)
        listener.listen(BACKLOG)
        return Listener(listener, path, _identity(path))
    except OSError:
        listener.close()
        raise


@contextmanager
def _turn(directory: Path) -> Iterator[None]:
    """Hold the directory's lock; raises ``_NotOurTurn`` while another process does."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:  # a directory that may be written to but not read: nobody can take turns there
        yield
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _NotOurTurn from None
        yield
    finally:
        os.close(descriptor)


def _remove_stale(path: Path) -> None:
    """Remove a socket that nobody listens on.

    Raises:
        AlreadyRunning: somebody does.
        StateError: the path is something else than a socket.
    """
    if not path.exists() and not path.is_symlink():
        return
    if not path.is_socket():
        raise StateError(f"{path} exists and is not a socket: remove it, or change consumer.socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(PROBE_S)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EAGAIN, errno.ETIMEDOUT):
                raise
    raise AlreadyRunning(f"another daemon listens on {path}: stop it, or change consumer.socket")
