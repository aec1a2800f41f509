"""Frames out of a stream of bytes. No I/O: says where the next bytes belong, and is told how many came.

Invariants:

* Nothing is copied: each part of a frame is received where it stays, payloads in memory of the pool.
* Lengths are checked before memory is taken for them.
* A position within a frame is kept for as long as it takes; nobody has to read a frame in one go.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from orchestrator.frames import DEFAULT_MAX_PAYLOAD_BYTES, PREFIX_BYTES, Prefix, parse_header, parse_prefix

from .buffers import BufferPool, Bytes

__all__ = ["Frame", "FrameReader"]


class Frame(NamedTuple):
    """A frame as received; ``payload`` is ``None`` where there is none."""

    header: dict[str, Any]
    payload: Bytes | None


class FrameReader:
    """See the module's invariants.

    Args:
        pool: memory for payloads.
    """

    def __init__(self, pool: BufferPool) -> None:
        self.max_payload = DEFAULT_MAX_PAYLOAD_BYTES
        self._pool = pool
        self._begin()

    def _begin(self) -> None:
        self._prefix: Prefix | None = None
        self._header: dict[str, Any] | None = None
        self._payload: Bytes | None = None
        self._expect(memoryview(bytearray(PREFIX_BYTES)))

    def _expect(self, part: memoryview) -> None:
        self._part = part
        self._filled = 0

    @property
    def is_between_frames(self) -> bool:
        """Whether no byte of the next frame has come."""
        return self._prefix is None and self._filled == 0

    @property
    def target(self) -> memoryview:
        """Where the next bytes belong; never empty."""
        return self._part[self._filled :]

    def advance(self, count: int) -> Frame | None:
        """``count`` bytes came into :attr:`target`; returns the frame if it is whole.

        Raises:
            FrameError: they are not a frame, or break a limit.
        """
        self._filled += count
        while self._filled == len(self._part):
            if self._prefix is None:
                self._prefix = parse_prefix(self._part, self.max_payload)
                self._expect(memoryview(bytearray(self._prefix.header_bytes)))
            elif self._header is None:
                self._header = parse_header(self._part)
                if self._prefix.payload_bytes:
                    self._payload = self._pool.take(self._prefix.payload_bytes)
                    self._expect(self._payload.data)
                    continue
                return self._finish(self._header)
            else:
                return self._finish(self._header)
        return None

    def _finish(self, header: dict[str, Any]) -> Frame:
        frame = Frame(header, self._payload)
        self._begin()
        return frame
