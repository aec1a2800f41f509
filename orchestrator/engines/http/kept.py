"""Connections that a stream left clean, for the next one.

A server of thousands of short generations a minute need not be connected to for each.

Invariants:

* Only what a whole answer was read from is kept, for ``KEPT_S`` at most: servers end idle connections after some
  seconds, and a request must not meet that.
* Whatever comes on a connection that is kept, its end or bytes that nobody asked for, ends it.
"""

from __future__ import annotations

import asyncio
from typing import Final

__all__ = ["KeptConnections"]

KEPT_S: Final = 2.0
"""uvicorn, which SGLang and vLLM are served by, ends idle connections after 5 s."""


class KeptConnections:
    """See the module's invariants; the newest is used first."""

    def __init__(self) -> None:
        self._idle: dict[_Idle, asyncio.Transport] = {}  # the oldest first
        self._timer: asyncio.TimerHandle | None = None
        self._is_closed = False

    def __len__(self) -> int:
        return len(self._idle)

    def put(self, transport: asyncio.Transport) -> None:
        """Keep this one."""
        if self._is_closed or transport.is_closing():
            transport.close()
            return
        loop = asyncio.get_running_loop()
        idle = _Idle(self, loop.time())
        transport.set_protocol(idle)
        self._idle[idle] = transport
        if self._timer is None:
            self._timer = loop.call_later(KEPT_S, self._close_old)

    def take(self) -> asyncio.Transport | None:
        """One that may be used; ``None``: there is none."""
        now = asyncio.get_running_loop().time()
        while self._idle:
            idle, transport = self._idle.popitem()
            if now - idle.since < KEPT_S and not transport.is_closing():
                return transport
            transport.close()
        return None

    def ended(self, idle: _Idle) -> None:
        """It cannot be used any more."""
        transport = self._idle.pop(idle, None)
        if transport is not None:
            transport.abort()

    def close(self) -> None:
        """Keep none, now and later."""
        self._is_closed = True
        if self._timer is not None:
            self._timer.cancel()
        while self._idle:
            self._idle.popitem()[1].close()

    def _close_old(self) -> None:
        loop, self._timer = asyncio.get_running_loop(), None
        while self._idle:
            idle = next(iter(self._idle))
            left_s = idle.since + KEPT_S - loop.time()
            if left_s > 0:
                self._timer = loop.call_later(left_s, self._close_old)
                return
            self._idle.pop(idle).close()


class _Idle(asyncio.Protocol):
    """Listens to a connection that is kept since a time of the loop's clock."""

    __slots__ = ("_kept", "since")

    def __init__(self, kept: KeptConnections, since: float) -> None:
        self._kept = kept
        self.since = since

    def data_received(self, data: bytes) -> None:
        self._kept.ended(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._kept.ended(self)
