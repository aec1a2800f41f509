"""The server-sent events of the page: steps and status.

Invariants:

* At most :data:`MAX_STREAMS` at a time. Nothing is queued: each stream sends what is new once its reader has taken what
  came before. A slow reader sees fewer states but all steps, and costs no memory.
* A reader that takes nothing for :data:`SEND_DEADLINE_S` is disconnected.
* The status is made at most once in :data:`PERIOD_S`, for any number of readers, and never without one.
* A reader that reconnects says what it has seen (``Last-Event-ID``) and gets what it missed. If the daemon was
  restarted meanwhile, it gets everything, and is told to discard what it has.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from typing import Any, Final

import anyio
import orjson
from aiohttp import web

from .assets import HEADERS
from .history import FIELDS, StepHistory

__all__ = ["MAX_STREAMS", "Streams"]

MAX_STREAMS: Final = 16
"""Pages open at a time, enough for a team; each costs a connection and some kilobytes a second."""

PERIOD_S: Final = 1.0
"""Between two statuses: people cannot read figures faster."""

SEND_DEADLINE_S: Final = 20.0
"""A sleeping laptop must not keep its connection for ever."""

RETRY_MS: Final = 1000
"""After which a page whose connection ended tries again."""


class Streams:
    """See the module's invariants.

    Args:
        status: everything that ``orchestrator status --json`` prints.
        history: the figures of the steps.
    """

    def __init__(self, status: Callable[[], Awaitable[dict[str, Any]]], history: StepHistory) -> None:
        self._status = status
        self._history = history
        self._instance = secrets.token_hex(8)
        self._open = 0
        self._made = -PERIOD_S  # when the newest status was, on the loop's clock
        self._newest = b""
        self._closing = anyio.Event()

    def close(self) -> None:
        """End all streams: the daemon is stopping."""
        self._closing.set()

    async def serve(self, request: web.Request) -> web.StreamResponse:
        """One stream, for as long as its reader stays."""
        if self._open >= MAX_STREAMS:
            return web.Response(status=503, text=f"{MAX_STREAMS} pages are open already: close one\n")
        self._open += 1
        try:
            return await self._stream(request)
        finally:
            self._open -= 1

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={**HEADERS, "Content-Type": "text/event-stream; charset=utf-8"})
        response.headers["Cache-Control"] = "no-store"
        seen = self._seen(request.headers.get("Last-Event-ID", ""))
        try:
            await response.prepare(request)
            await self._send(response, f"retry: {RETRY_MS}\n".encode() + self._steps(seen, is_first=True))
            seen = self._history.newest
            while not self._closing.is_set():
                news = self._steps(seen) if self._history.newest > seen else b""
                seen = self._history.newest
                await self._send(response, news + await self._status_event())
                with anyio.move_on_after(PERIOD_S):
                    await self._closing.wait()
        except (ConnectionError, TimeoutError):
            pass  # the tab was closed, or its machine sleeps: every stream ends like this
        return response

    async def _send(self, response: web.StreamResponse, data: bytes) -> None:
        with anyio.fail_after(SEND_DEADLINE_S):
            await response.write(data)

    def _seen(self, last_id: str) -> int | None:
        """Number of the newest step that the reader has; ``None``: it has none of this process."""
        instance, _, number = last_id.partition(":")
        return int(number) if instance == self._instance and number.isdecimal() and len(number) < 19 else None

    def _steps(self, seen: int | None, *, is_first: bool = False) -> bytes:
        """The steps after those that were seen, as an event."""
        head = orjson.dumps({"fields": FIELDS, "reset": is_first and seen is None})[:-1]
        points = b",".join(self._history.since(seen or 0))
        name = f"id: {self._instance}:{self._history.newest}\nevent: steps\ndata: ".encode()
        return name + head + b',"points":[' + points + b"]}\n\n"

    async def _status_event(self) -> bytes:
        now = anyio.current_time()
        if now - self._made >= PERIOD_S / 2:
            self._made = now
            self._newest = b"event: status\ndata: " + orjson.dumps(await self._status()) + b"\n\n"
        return self._newest
