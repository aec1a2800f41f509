"""The events of one answer, decoded as they come off the wire.

A generation has tens to thousands of events. They are decoded and handed over in the loop's own callback, so that the
task that asked is woken once: when the stream is over.

Invariants:

* Whoever takes the events says when it has enough; it is called no more after that, nor after an error, ``[DONE]`` or
  the end of the answer, whichever is first. What it raises ends the stream, and reaches the waiting task.
* Every line, the text of a refusal, and all that is not part of the answer itself is bounded, whatever the server says.
* However a stream ends, its connection is closed or given to ``keep``, and ``left`` is called, once. It is given away
  only after the whole answer was read, the rest of which is waited for after the stream is over.
* A connection that was kept and ends before a byte of the answer is no failure: the request is sent on another one.
* A wait for the end may be cancelled and begun again: events are taken meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final, Generic, Self, TypeVar, cast

import httptools
import msgspec

from .errors import Failures, redirected_to, said

__all__ = ["Connections", "EventStream"]

MAX_LINE_BYTES: Final = 64 << 20
"""A cumulative event repeats the whole response with its log-probabilities: a million tokens at 50 bytes fit."""

MAX_ERROR_BYTES: Final = 4096

MAX_BESIDE_BYTES: Final = 256 << 10
"""Of headers, trailers, interim answers and extensions of chunks, received without a byte of the answer itself; what
comes with one read of the socket is in it."""

TAIL_S: Final = 1.0
"""Within which the rest of an answer has to come that a connection is kept after; it is a few bytes."""

DONE: Final = b"[DONE]"
SHORT: Final = 16
"""Bytes, with white space around ``DONE``."""

IS_OK: Final = 200

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Connections:
    """Where a stream has its connection from, and where it leaves it.

    ``connect`` makes one for it; ``keep`` takes one that may be used again, ``None``: it is closed; ``left`` is called
    when the stream has nothing to do with its connection any more.
    """

    connect: Callable[[EventStream[Any]], Awaitable[None]]
    left: Callable[[EventStream[Any]], object]
    keep: Callable[[asyncio.Transport], None] | None = None


class EventStream(asyncio.Protocol, Generic[T]):
    """One request on a connection, and its answer; left with the ``with`` block.

    Args:
        failures: makes errors.
        path: for these.
        request: all bytes of it.
        decoder: of an event.
        on_event: takes an event, and says whether that was enough.
        connections: see :class:`Connections`.
        error_s: in which the text of a refusal has to come.
    """

    __slots__ = (
        "_beside",
        "_connect",
        "_decoder",
        "_error",
        "_error_s",
        "_failures",
        "_has_end",
        "_is_over",
        "_is_reused",
        "_is_stale",
        "_is_whole",
        "_keep",
        "_left",
        "_location",
        "_on_event",
        "_parser",
        "_request",
        "_rest",
        "_status",
        "_timer",
        "_transport",
        "_waiter",
        "path",
    )

    def __init__(
        self,
        failures: Failures,
        path: str,
        request: bytes,
        decoder: msgspec.json.Decoder[T],
        on_event: Callable[[T], bool],
        *,
        connections: Connections,
        error_s: float,
    ) -> None:
        self._failures = failures
        self.path = path
        self._request: bytes | None = request
        self._decoder = decoder
        self._on_event: Callable[[T], bool] | None = on_event
        self._error_s = error_s
        self._left: Callable[[EventStream[Any]], object] | None = connections.left
        self._connect = connections.connect
        self._keep = connections.keep
        self._parser: httptools.HttpResponseParser | None = None
        self._transport: asyncio.Transport | None = None
        self._rest = bytearray()  # of a line; or the text of a refusal
        self._status = 0
        self._location = ""
        self._beside = 0
        self._has_end = False  # otherwise the answer goes on until the connection ends
        self._is_over = False
        self._is_whole = False  # the answer has come to its end, and left the connection to the next one
        self._is_reused = False  # its connection, of which nothing has come yet
        self._is_stale = False
        self._error: Exception | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._waiter: asyncio.Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave it."""
        self._end()

    @property
    def has_begun(self) -> bool:
        """Whether the server has begun to answer."""
        return self._status != 0

    async def ended(self) -> None:
        """Wait until it is over; it has no deadline: the caller sets one.

        Raises:
            EngineRejected, EngineUnavailable: see ``errors``; or what ``on_event`` raised.
        """
        while not self._is_over:
            if self._is_stale:
                self._is_stale = False
                await self._connect(self)
            else:
                self._waiter = asyncio.get_running_loop().create_future()
                await self._waiter
        if self._error is not None:
            raise self._error

    def fail(self, error: Exception) -> None:
        """End it with an error, unless it is over, and its connection in any case."""
        self._end(error)
        self._leave()

    def _end(self, error: Exception | None = None, *, is_clean: bool = False) -> None:
        if self._is_over:
            return
        self._is_over, self._error = True, error
        self._on_event = self._request = None
        self._rest = bytearray()
        self._set_timer(None)
        self._wake()
        if is_clean and self._keep is not None and self._transport is not None:
            self._set_timer(asyncio.get_running_loop().call_later(TAIL_S, self._leave))
        else:
            self._leave(is_clean=is_clean)

    def _leave(self, *, is_clean: bool = False) -> None:
        """Part with the connection, if that was not done."""
        self._set_timer(None)
        transport, self._transport = self._transport, None
        self._parser = None  # it holds methods of this object
        left, self._left = self._left, None
        if left is not None:
            left(self)
        if transport is None:
            return
        if self._is_whole and self._keep is not None:
            self._keep(transport)
        elif is_clean:
            transport.close()
        else:
            transport.abort()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _set_timer(self, timer: asyncio.TimerHandle | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = timer

    # -- the connection ------------------------------------------------------------------------------------------------

    def adopt(self, transport: asyncio.Transport) -> None:
        """Use a connection that was kept."""
        transport.set_protocol(self)
        self._is_reused = True
        self.connection_made(transport)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the request."""
        if self._request is None:  # it was given up
            cast(asyncio.Transport, transport).abort()
            return
        self._transport = cast(asyncio.Transport, transport)
        self._parser = httptools.HttpResponseParser(self)
        self._transport.write(self._request)
        if not self._is_reused:
            self._request = None

    def data_received(self, data: bytes) -> None:
        """Parse what came, which calls the methods below."""
        if self._parser is None:
            return
        self._beside += len(data)
        if self._is_reused:
            self._is_reused, self._request = False, None
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self.fail(self._failures.wrong(self.path, f"not HTTP: {error}"))
        if self._beside > MAX_BESIDE_BYTES:
            self.fail(self._failures.unavailable(f"{self.path}: {MAX_BESIDE_BYTES} bytes, but none of the answer"))
        if self._is_whole and self._transport is not None:
            self._leave()

    def connection_lost(self, exc: Exception | None) -> None:
        """The end of an answer that has no other; of any other it is a failure."""
        self._transport = None
        if self._is_over:
            self._leave()
        elif self._is_reused:
            self._is_reused, self._is_stale, self._parser = False, True, None
            self._wake()
        elif self._status not in (0, IS_OK):
            self._refuse()
        elif exc is not None:
            self._end(self._failures.unavailable(f"{self.path}: {said(exc)}"))
        elif self._status == 0:
            self._end(self._failures.unavailable(f"{self.path}: the server disconnected without an answer"))
        elif self._has_end:
            self._end(self._failures.unavailable(f"{self.path}: the connection ended in the middle of the answer"))
        else:
            self._end()

    # -- the answer, as the parser tells of it -------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """What follows a whole answer was not asked for: its connection is not kept."""
        self._is_whole = False

    def on_header(self, name: bytes, value: bytes) -> None:
        """Of an answer, or of its trailer."""
        match name.lower():
            case b"content-length" | b"transfer-encoding":
                self._has_end = True
            case b"location":
                self._location = value.decode("latin-1")[:300]
            case b"content-encoding" if value.strip().lower() != b"identity" and not self._is_over:
                encoding = value.decode("latin-1")[:100]
                self._end(self._failures.wrong(self.path, f"content encoding {encoding}, which was not requested"))

    def on_headers_complete(self) -> None:
        """The status is known. Interim answers (100, 103) come before the one that counts."""
        if self._parser is None:
            return
        status = self._parser.get_status_code()
        if 100 <= status < 200:
            self._has_end = False
            return
        self._status = status
        if status != IS_OK:
            self._set_timer(asyncio.get_running_loop().call_later(self._error_s, self._refuse))

    def on_body(self, data: bytes) -> None:
        """Some of the answer."""
        if self._is_over:
            return
        self._beside = 0
        if self._status == IS_OK:
            self._read(data)
            return
        self._rest += data
        if len(self._rest) >= MAX_ERROR_BYTES:
            self._refuse()

    def on_message_complete(self) -> None:
        """The end of the answer, or of an interim one."""
        if self._status == IS_OK:
            self._is_whole = self._parser is not None and self._has_end and self._parser.should_keep_alive()
            self._end(is_clean=True)
        elif self._status:
            self._refuse()

    def _refuse(self) -> None:
        """It is over with what came of the text; a redirection is not followed, as the key would go along."""
        text = bytes(self._rest[:MAX_ERROR_BYTES])
        if 300 <= self._status < 400 and self._location:
            text = redirected_to(self._location)
        self._end(self._failures.of_answer(self.path, self._status, text))

    # -- lines ---------------------------------------------------------------------------------------------------------

    def _read(self, data: bytes) -> None:
        at, end = 0, data.find(b"\n")
        if end >= 0 and self._rest:
            data = bytes(self._rest) + data
            end += len(self._rest)
            self._rest = bytearray()
        while end >= 0:
            if data.startswith(b"data:", at):
                self._take(data[at + 5 : end])
            elif data.startswith(b"error:", at):
                words = data[at + 6 : min(end, at + 300)].decode(errors="replace").strip()
                self._end(self._failures.unavailable(f"{self.path}: {words}"))
            if self._is_over:
                return
            at = end + 1
            end = data.find(b"\n", at)
        if at < len(data):
            self._rest += data[at:] if at else data
            if len(self._rest) > MAX_LINE_BYTES:
                self._end(self._failures.unavailable(f"{self.path}: a line has more than {MAX_LINE_BYTES} bytes"))

    def _take(self, data: bytes) -> None:
        if len(data) < SHORT and data.strip() == DONE:
            self._end(is_clean=True)
            return
        try:
            # Strictly: msgspec passes over keys that it does not know.
            event = self._decoder.decode(data if data.isascii() else str(data, "utf-8"))
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            self._end(self._failures.wrong(self.path, error))
            return
        assert self._on_event is not None
        try:
            if self._on_event(event):
                self._end(is_clean=True)
        except Exception as error:  # noqa: BLE001 - it is raised where the stream is waited for, and not in the loop
            self._end(error)
