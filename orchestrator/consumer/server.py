"""The Unix socket of the consumer API.

Invariants:

* The socket belongs to the user alone (mode 0600). A path that a live process listens on is never taken over: the state
  lock is held before this is reached, and a foreign listener is an error.
* At most ``max_connections`` connections; one more is accepted and closed at once.
* Every connection is a task of the server's task group.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import socket
from pathlib import Path
from typing import Final

import anyio
from anyio.abc import TaskStatus
from structlog.typing import FilteringBoundLogger

from orchestrator.errors import AlreadyRunning, StateError

from .connection import READER_LIMIT_BYTES, Connection
from .service import ConsumerService

__all__ = ["ConsumerServer"]

BACKLOG: Final = 128

ACCEPT_RETRY_S: Final = 0.5
"""Until the next try after the system had no descriptor or memory for a connection; its peer waits meanwhile."""

_PASSING = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ECONNABORTED})


class ConsumerServer:
    """See the module's invariants.

    Args:
        path: of the socket; at most 107 bytes (Linux).
        service: the methods.
        max_connections: at a time.
        log: for connections.
    """

    def __init__(
        self, path: Path, service: ConsumerService, *, max_connections: int, log: FilteringBoundLogger
    ) -> None:
        self._path = path
        self._max_connections = max_connections
        self._service = service
        self._log = log
        self._numbers = itertools.count(1)

    def _bind(self) -> socket.socket:
        """A listening socket, in place of a stale one.

        Raises:
            AlreadyRunning: somebody listens there.
            StateError: the path cannot be bound.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        mask = os.umask(0o177)
        try:
            self._remove_stale()
            listener.bind(str(self._path))
            listener.listen(BACKLOG)
        except OSError as error:
            listener.close()
            if isinstance(error, AlreadyRunning):
                raise
            raise StateError(f"cannot listen on {self._path}: {error.strerror or error}") from error
        finally:
            os.umask(mask)
        return listener

    def _remove_stale(self) -> None:
        """Remove a socket that nobody listens on.

        Raises:
            AlreadyRunning: somebody does.
            StateError: the path is something else than a socket.
        """
        if not self._path.exists() and not self._path.is_symlink():
            return
        if not self._path.is_socket():
            raise StateError(f"{self._path} is there and is no socket: remove it, or change consumer.socket")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(1)
            try:
                probe.connect(str(self._path))
            except ConnectionRefusedError:
                self._path.unlink()
                return
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.EAGAIN, errno.ETIMEDOUT):
                    raise
        raise AlreadyRunning(f"another daemon listens on {self._path}: stop it, or change consumer.socket")

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """Accept connections until cancelled; ready when the socket is bound."""
        listener = await anyio.to_thread.run_sync(self._bind)
        inode = os.stat(self._path).st_ino
        try:
            async with anyio.create_task_group() as connections:
                task_status.started()
                while True:
                    connections.start_soon(self._serve, await self._accept(listener))
        finally:
            listener.close()
            self._unlink(inode)

    async def _accept(self, listener: socket.socket) -> socket.socket:
        """The next connection; a shortage of descriptors delays it and ends nothing."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                return (await loop.sock_accept(listener))[0]
            except OSError as error:
                if error.errno not in _PASSING:
                    raise
                self._log.warning(f"a connection cannot be accepted yet: {error.strerror}")
                await anyio.sleep(ACCEPT_RETRY_S)

    def _unlink(self, inode: int) -> None:
        """Remove the socket, unless somebody has put another in its place."""
        try:
            if self._path.stat().st_ino == inode:
                self._path.unlink()
        except FileNotFoundError:
            self._log.debug(f"the socket {self._path} was removed by somebody else")

    async def _serve(self, peer: socket.socket) -> None:
        if len(self._service.connections) >= self._max_connections:
            self._log.warning(f"a connection was refused: {self._max_connections} are open")
            peer.close()
            return
        reader, writer = await asyncio.open_unix_connection(sock=peer, limit=READER_LIMIT_BYTES)
        connection = Connection(next(self._numbers), reader, writer, peer, self._log)
        self._service.opened(connection)
        try:
            await connection.serve(self._service.handle)
        finally:
            self._service.closed(connection)
