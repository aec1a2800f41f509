"""What is on its way to one client.

Invariants:

* Frames are written whole, one after the other, in the order in which their turns came. Stored frames go to the
  transport as they are: nothing is joined, copied or encoded again.
* Descriptors leave with the first byte of their frame, at once or not at all: only while nothing else is on its way,
  and the socket has room.
* A client that takes nothing for ``SEND_STALL_S`` is given up, whatever it keeps from leaving. One that has a batch in
  hand may be at work on it, and gets ``SEND_STALL_AT_WORK_S``. Any progress starts the time anew.
"""

from __future__ import annotations

import array
import asyncio
import socket
from collections.abc import Callable, Sequence
from typing import Final

import anyio

__all__ = ["SendQueue"]

SEND_STALL_S: Final = 30.0
"""A client on the same machine that waits for its answer reads it within milliseconds; a stopped one never does."""

SEND_STALL_AT_WORK_S: Final = 3600.0
"""A trainer that prefetches reads the next batch when it is done with the one in hand: tens of minutes are normal."""


class SendQueue:
    """See the module's invariants.

    Args:
        sock: of the connection.
        writer: what writes to it.
        is_at_work: whether the client has a batch in hand.
    """

    def __init__(self, sock: socket.socket, writer: asyncio.StreamWriter, is_at_work: Callable[[], bool]) -> None:
        self._sock = sock
        self._writer = writer
        self._is_at_work = is_at_work
        self._turn = anyio.Lock()

    async def send(self, head: bytes, frames: Sequence[bytes | memoryview] = ()) -> None:
        """Write one frame when its turn comes; returns when the client has taken nearly all of it.

        Raises:
            TimeoutError: the client takes nothing.
            ConnectionError: it is gone.
        """
        async with self._turn:
            *parts, last = head, *frames
            self._writer.writelines(parts)
            self._writer.write(last)  # asyncio of 3.12.1 and 3.13.0 never pauses in writelines
            await self._drain()

    async def send_descriptors(self, head: bytes, descriptors: Sequence[int]) -> bool:
        """Write a frame without a payload, and with it these descriptors; whether that could be done at once.

        Raises:
            TimeoutError, ConnectionError: see :meth:`send`.
        """
        passed = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
        async with self._turn:
            transport = self._writer.transport
            if transport.get_write_buffer_size() or transport.is_closing():
                return False
            try:
                sent = self._sock.sendmsg([head], passed, socket.MSG_NOSIGNAL)
            except OSError:  # no room, too many descriptors on their way, or the connection broke: `send` will tell
                return False
            if sent < len(head):
                self._writer.write(head[sent:])
                await self._drain()
            return True

    def send_last(self, head: bytes) -> None:
        """Write one frame after whatever is on its way, without waiting for its turn."""
        if not self._writer.transport.is_closing():
            self._writer.write(head)

    async def _drain(self) -> None:
        transport, stalled_s = self._writer.transport, 0.0
        left = transport.get_write_buffer_size()
        while True:
            with anyio.move_on_after(SEND_STALL_S):
                await self._writer.drain()
                return
            before, left = left, transport.get_write_buffer_size()
            stalled_s = stalled_s + SEND_STALL_S if left >= before else 0.0
            if stalled_s >= (SEND_STALL_AT_WORK_S if self._is_at_work() else SEND_STALL_S):
                raise TimeoutError(f"{left} bytes wait for a client that has read nothing for {stalled_s:g} s")
