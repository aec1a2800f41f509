"""One thread that writes lines to a file or a stream, behind a bounded queue.

Invariants:

* ``offer`` never waits for the file: a pipe that nobody reads, or a disk that hangs, blocks only the thread.
* At most ``QUEUE_BYTES`` are queued. Lines beyond that, and lines that cannot be written, are dropped and counted. The
  count is written as a line of its own as soon as writing works again.
* Lines that are not urgent wait for :data:`GATHER_S` at most to be written with later ones, because waking a thread
  costs more than a line. All other lines are written at once, together with those that wait: they may be the last ones
  of the process.
* Lines are whole or absent. If the file ends in half a line (a full disk, a killed process), that line is ended before
  the next begins. Lines keep their order; ``reopen`` takes its place among them.
"""

from __future__ import annotations

import os
import select
import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, TextIO

from orchestrator.errors import StateError

__all__ = ["FLUSH_DEADLINE_S", "QUEUE_BYTES", "LogWriter", "Sink"]

QUEUE_BYTES: Final = 8 << 20
"""8 MiB, some ten thousand lines: enough for minutes of a stopped reader, and little beside the daemon's data."""

WRITE_BYTES: Final = 256 << 10
"""Lines are gathered up to this size into one write."""

GATHER_S: Final = 0.05
"""Seconds; too short for a reader to notice."""

FLUSH_DEADLINE_S: Final = 3.0
"""How long ``close`` waits for the last lines; a reader that has not read by then is not going to."""

_END: Final = ord("\n")


class Sink:
    """A descriptor to append to: of a file by path, or a duplicate of a stream's.

    Args:
        file: path; its directory is made where missing. ``None`` for the stream.
        stream: has a file descriptor; ``None`` (a process without standard output) swallows everything.

    Raises:
        StateError: the file cannot be opened.
    """

    def __init__(self, file: Path | None, stream: TextIO | None) -> None:
        self._file = file
        self._is_torn = False
        if file is not None:
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                self._fd = self._open(file)
            except OSError as error:
                raise StateError(f"cannot open the log file {file}: {error.strerror}; check `logging.file`") from error
        else:
            self._fd = os.open(os.devnull, os.O_WRONLY) if stream is None else os.dup(stream.fileno())
        self.is_terminal = file is None and os.isatty(self._fd)

    def _open(self, file: Path) -> int:
        fd = os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        size = os.fstat(fd).st_size
        self._is_torn = size > 0 and os.pread(fd, 1, size - 1)[0] != _END
        return fd

    def write(self, lines: bytes) -> tuple[int, OSError | None]:
        """Append whole lines, however long it takes.

        Returns:
            How many bytes of ``lines`` were written, and the error that stopped the rest.
        """
        rest = memoryview(b"\n" + lines if self._is_torn else lines)
        while rest:
            try:
                written = os.write(self._fd, rest)
            except BlockingIOError:  # a pipe that another process made non-blocking
                poll = select.poll()
                poll.register(self._fd, select.POLLOUT)
                poll.poll()
                continue
            except OSError as error:
                return max(0, len(lines) - len(rest)), error
            if written:
                self._is_torn = rest[written - 1] != _END
            rest = rest[written:]
        return len(lines), None

    def reopen(self) -> None:
        """Continue in a new file of the same path, after the old one was renamed; a stream is left alone.

        Raises:
            OSError: the file cannot be opened; the old one stays in use.
        """
        if self._file is not None:
            old, self._fd = self._fd, self._open(self._file)
            os.close(old)

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._fd)


class LogWriter:
    """The queue and the thread; see the module's invariants.

    Args:
        sink: where lines go; closed at the end.
        loss: makes the line that says how many lines were lost (0: none, but something is wrong) and why.
        queue_bytes: bound of the queue.
    """

    def __init__(self, sink: Sink, loss: Callable[[int, str], bytes], *, queue_bytes: int = QUEUE_BYTES) -> None:
        self._sink = sink
        self._loss = loss
        self._bound = queue_bytes
        self._queue: deque[bytes | None] = deque()  # None: reopen the file
        self._queued = 0
        self._lost = 0
        self._fault = ""
        self._is_closed = False
        self._is_resting = False  # whether the thread waits for more lines that are not urgent
        self._is_urgent = False
        # Re-entrant: a finaliser of the garbage collector may log while this very thread holds it.
        self._changed = threading.Condition(threading.RLock())
        # A daemon thread: one that hangs in a write must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name="log-writer", daemon=True)
        self._thread.start()

    def offer(self, *lines: bytes) -> None:
        """Queue lines; those that do not fit are dropped and counted."""
        self._offer(lines, is_urgent=True)

    def offer_later(self, *lines: bytes) -> None:
        """The same for lines that are not urgent: a kill may lose those of the last :data:`GATHER_S`."""
        self._offer(lines, is_urgent=False)

    def _offer(self, lines: Sequence[bytes], *, is_urgent: bool) -> None:
        with self._changed:
            if self._is_closed:
                return
            for line in lines:
                if self._queued + len(line) > self._bound:
                    self._lose(1, "the queue was full because the reader of the log is too slow or has stopped")
                    continue
                self._queue.append(line)
                self._queued += len(line)
            self._is_urgent |= is_urgent
            if is_urgent or not self._is_resting:
                self._changed.notify()

    def reopen(self) -> None:
        """Reopen the file after the lines offered so far; returns at once."""
        with self._changed:
            if not self._is_closed and None not in list(self._queue)[-1:]:
                self._queue.append(None)
                self._is_urgent = True
                self._changed.notify()

    def close(self, deadline_s: float = FLUSH_DEADLINE_S) -> None:
        """Write what is queued, for at most ``deadline_s`` seconds, and end. Calling it again is harmless."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join(deadline_s)

    def _lose(self, lines: int, why: str) -> None:
        with self._changed:
            self._lost += lines
            self._fault = why

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._is_closed)
                self._is_urgent = False
                is_order = bool(self._queue) and self._queue[0] is None
                batch = [] if is_order else self._take()
                if is_order:
                    self._queue.popleft()
                lost, fault = self._lost, self._fault
                self._lost, self._fault = 0, ""
                is_empty = not self._queue
                is_last = self._is_closed and is_empty
            if is_order:
                self._reopen()
            self._write(batch, lost, fault)
            if is_last:
                self._sink.close()
                return
            if is_empty:
                self._rest()

    def _rest(self) -> None:
        with self._changed:
            self._is_resting = True
            self._changed.wait_for(lambda: self._is_urgent or self._is_closed, GATHER_S)
            self._is_resting = False

    def _take(self) -> list[bytes]:
        """The lines of the next write, up to the next order to reopen the file."""
        batch: list[bytes] = []
        size = 0
        while self._queue and size < WRITE_BYTES and (line := self._queue[0]) is not None:
            self._queue.popleft()
            batch.append(line)
            size += len(line)
        self._queued -= size
        return batch

    def _reopen(self) -> None:
        try:
            self._sink.reopen()
        except OSError as error:
            self._lose(0, f"cannot reopen the log file, so the old one stays in use: {error}")

    def _write(self, batch: list[bytes], lost: int, fault: str) -> None:
        loss = self._loss(lost, fault) if fault else b""
        written, error = self._sink.write(loss + b"".join(batch))
        if error is None:
            return
        written -= len(loss)
        failed = lost if written < 0 else 0
        for line in batch:
            written -= len(line)
            failed += written < 0
        self._lose(failed, f"writing failed: {error}")
