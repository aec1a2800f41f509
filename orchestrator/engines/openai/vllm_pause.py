"""Pauses of a vLLM server, which a trainer makes to change the parameters.

While it is paused, version 0.32 lets new requests wait without a word, and 0.33 refuses them with 503. Neither is the
fault of the request: it waits, and the pool is told that this is no stall.

Invariants:

* Nothing is asked of a server that answers.
* The server is asked at most once within ``PAUSE_CHECK_INTERVAL_S``, however many requests wait, and once more when one
  is refused. One that has no ``/is_paused`` cannot be paused, and is not asked again.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, TypeVar

import anyio
import msgspec

from orchestrator.engines.http.client import EngineHttp
from orchestrator.engines.port import TokenSink
from orchestrator.errors import EngineError, EngineRejected, EngineUnavailable

__all__ = ["Listener", "PauseWatch"]

T = TypeVar("T")

PAUSE_CHECK_INTERVAL_S: Final = 1.0
"""Well below any sensible ``stall_s``, so that a pause is known before it counts as a stall."""

PAUSE_CHECK_DEADLINE_S: Final = 5.0


class _Answer(msgspec.Struct):
    is_paused: bool


@dataclass(slots=True, eq=False)
class Listener:
    """A request under way; whoever hears of it sets ``heard``."""

    sink: TokenSink
    heard: bool = False


class PauseWatch:
    """See the module's docstring.

    Args:
        http: the server.
    """

    def __init__(self, http: EngineHttp) -> None:
        self._http = http
        self._listeners: set[Listener] = set()
        self._lock = anyio.Lock()
        self._can_pause = True
        self._was_paused = False
        self._asked_at = -math.inf

    async def run(self) -> None:
        """Tell requests that hear nothing when the server is paused; until cancelled."""
        while True:
            await anyio.sleep(PAUSE_CHECK_INTERVAL_S)
            silent = [listener for listener in self._listeners if not listener.heard]
            for listener in self._listeners:
                listener.heard = False
            if silent and await self.is_paused():
                for listener in silent:
                    if listener in self._listeners:
                        listener.sink((), (), "")

    @contextmanager
    def listening(self, sink: TokenSink) -> Iterator[Listener]:
        """Have a request told of pauses while it is under way."""
        listener = Listener(sink)
        self._listeners.add(listener)
        try:
            yield listener
        finally:
            self._listeners.discard(listener)

    async def outlast(self, send: Callable[[], Awaitable[T]], sink: TokenSink) -> T:
        """What ``send`` gives; a request that a paused server refused has not begun, and is sent again after the pause.

        Raises:
            EngineRejected, EngineUnavailable, EngineStalled: as ``send``.
        """
        while True:
            try:
                return await send()
            except EngineUnavailable as error:
                if error.data.get("status") != 503 or not await self.over(sink):
                    raise

    async def over(self, sink: TokenSink) -> bool:
        """Wait for the end of a pause; ``False``: there was none. The caller sets a deadline."""
        if not await self.is_paused(since=anyio.current_time()):
            return False
        while await self.is_paused():
            sink((), (), "")
            await anyio.sleep(PAUSE_CHECK_INTERVAL_S)
        return True

    async def is_paused(self, *, since: float = -math.inf) -> bool:
        """Whether the server says so; an answer counts for a while, a no only if it was asked for after ``since``."""
        async with self._lock:
            now = anyio.current_time()
            is_old = now - self._asked_at >= PAUSE_CHECK_INTERVAL_S or (not self._was_paused and self._asked_at < since)
            if self._can_pause and is_old:
                self._asked_at = now
                self._was_paused = await self._ask()
            return self._was_paused

    async def _ask(self) -> bool:
        try:
            return (await self._http.ask("/is_paused", _Answer, deadline_s=PAUSE_CHECK_DEADLINE_S)).is_paused
        except EngineRejected:
            self._can_pause = False
        except EngineError:
            pass  # how the server is, others find out
        return False
