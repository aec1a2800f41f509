"""The events of one answer, decoded as they come off the wire.

A generation has tens to thousands of events. They are decoded and handed over in the loop's own callback, so that the
task that asked is woken once: when the stream is over.

Invariants:

* Whoever takes the events says when it has enough; it is called no more after that, nor after an error, ``[DONE]`` or
  the end of the answer, whichever is first. What it raises ends the stream, and reaches the waiting task.
* Every line, the text of a refusal, and all that is not part of the answer itself is bounded, whatever the server says.
* However a stream ends, its connection is closed and ``left`` is called, once.
* A wait for the end may be cancelled and begun again: events are taken meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final, Generic, Self, TypeVar, cast

import httptools
import msgspec

from .http_errors import Failures, said

__all__ = ["EventStream"]

MAX_LINE_BYTES: Final = 64 << 20
"""A cumulative event repeats the whole response with its log-probabilities: a million tokens at 50 bytes fit."""

MAX_ERROR_BYTES: Final = 4096

MAX_BESIDE_BYTES: Final = 256 << 10
"""Of headers, trailers, interim answers and extensions of chunks, received without a byte of the answer itself; what
comes with one read of the socket is in it."""

DONE: Final = b"[DONE]"
IS_OK: Final = 200

T = TypeVar("T")


class EventStream(asyncio.Protocol, Generic[T]):
    """One request on a connection of its own, and its answer; closed on leaving the ``with`` block.

    Args:
        failures: makes errors.
        path: for these.
        request: all bytes of it.
        decoder: of an event.
        on_event: takes an event, and says whether that was enough.
        error_s: in which the text of a refusal has to come.
        left: called when it is over.
    """

    __slots__ = (
        "_beside",
        "_decoder",
        "_error",
        "_error_s",
        "_failures",
        "_has_end",
        "_is_over",
        "_left",
        "_location",
        "_on_event",
        "_parser",
        "_path",
        "_request",
        "_rest",
        "_status",
        "_timer",
        "_transport",
        "_waiter",
    )

    def __init__(
        self,
        failures: Failures,
        path: str,
        request: bytes,
        decoder: msgspec.json.Decoder[T],
        on_event: Callable[[T], bool],
        *,
        error_s: float,
        left: Callable[[EventStream[Any]], None],
    ) -> None:
        self._failures = failures
        self._path = path
        self._request: bytes | None = request
        self._decoder = decoder
        self._on_event: Callable[[T], bool] | None = on_event
        self._error_s = error_s
        self._left = left
        self._parser: httptools.HttpResponseParser | None = None
        self._transport: asyncio.Transport | None = None
        self._rest = bytearray()  # of a line; or the text of a refusal
        self._status = 0
        self._location = ""
        self._beside = 0
        self._has_end = False  # otherwise the answer goes on until the connection ends
        self._is_over = False
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
            EngineRejected, EngineUnavailable: see ``http_errors``; or what ``on_event`` raised.
        """
        if not self._is_over:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self._error is not None:
            raise self._error

    def fail(self, error: Exception) -> None:
        """End it with an error, unless it is over."""
        self._end(error)

    def _end(self, error: Exception | None = None, *, is_clean: bool = False) -> None:
        if self._is_over:
            return
        self._is_over, self._error = True, error
        self._parser = self._on_event = self._request = None  # the parser holds methods of this object
        self._rest = bytearray()
        if self._timer is not None:
            self._timer.cancel()
        if self._transport is not None:
            self._transport.close() if is_clean else self._transport.abort()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
        self._left(self)

    # -- the connection ------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the request."""
        if self._request is None:  # it was given up
            cast(asyncio.Transport, transport).abort()
            return
        self._transport = cast(asyncio.Transport, transport)
        self._parser = httptools.HttpResponseParser(self)
        self._transport.write(self._request)
        self._request = None

    def data_received(self, data: bytes) -> None:
        """Parse what came, which calls the methods below."""
        if self._parser is None:
            return
        self._beside += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._end(self._failures.wrong(self._path, f"no HTTP: {error}"))
        if self._beside > MAX_BESIDE_BYTES:
            self._end(self._failures.unavailable(f"{self._path}: {MAX_BESIDE_BYTES} bytes without any of the answer"))

    def connection_lost(self, exc: Exception | None) -> None:
        """The end of an answer that has no other; of any other it is a failure."""
        self._transport = None
        if self._is_over:
            return
        if self._status not in (0, IS_OK):
            self._refuse()
        elif exc is not None:
            self._end(self._failures.unavailable(f"{self._path}: {said(exc)}"))
        elif self._status == 0:
            self._end(self._failures.unavailable(f"{self._path}: the server disconnected without an answer"))
        elif self._has_end:
            self._end(self._failures.unavailable(f"{self._path}: the connection ended in the middle of the answer"))
        else:
            self._end()

    # -- the answer, as the parser tells of it -------------------------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        """Of an answer, or of its trailer."""
        match name.lower():
            case b"content-length" | b"transfer-encoding":
                self._has_end = True
            case b"location":
                self._location = value.decode("latin-1")[:300]
            case b"content-encoding" if value.strip().lower() != b"identity" and not self._is_over:
                encoding = value.decode("latin-1")[:100]
                self._end(self._failures.wrong(self._path, f"content of the encoding {encoding}, not asked for"))

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
            self._timer = asyncio.get_running_loop().call_later(self._error_s, self._refuse)

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
            self._end(is_clean=True)
        elif self._status:
            self._refuse()

    def _refuse(self) -> None:
        """It is over with what came of the text; a redirection is not followed, as the key would go along."""
        text = bytes(self._rest[:MAX_ERROR_BYTES])
        if 300 <= self._status < 400 and self._location:
            text = f"it sends requests on to {self._location}: give the url of that server".encode()
        self._end(self._failures.of_answer(self._path, self._status, text))

    # -- lines ---------------------------------------------------------------------------------------------------------

    def _read(self, data: bytes) -> None:
        if b"\n" in data:
            if self._rest:
                data = bytes(self._rest) + data
                self._rest = bytearray()
            *lines, rest = data.split(b"\n")
            for line in lines:
                if line:
                    self._take(line)
                    if self._is_over:
                        return
            if rest:
                self._rest += rest
        else:
            self._rest += data
        if len(self._rest) > MAX_LINE_BYTES:
            self._end(self._failures.unavailable(f"{self._path}: a line of more than {MAX_LINE_BYTES} bytes"))

    def _take(self, line: bytes) -> None:
        if line.startswith(b"data:"):
            data = line[5:]
            if len(data) < 16 and data.strip() == DONE:
                self._end(is_clean=True)
            else:
                self._hand_over(data)
        elif line.startswith(b"error:"):
            words = line[6:300].decode(errors="replace").strip()
            self._end(self._failures.unavailable(f"{self._path}: {words}"))

    def _hand_over(self, data: bytes) -> None:
        assert self._on_event is not None
        try:
            # Strictly: msgspec passes over keys that it does not know.
            event = self._decoder.decode(data if data.isascii() else str(data, "utf-8"))
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            self._end(self._failures.wrong(self._path, error))
            return
        try:
            if self._on_event(event):
                self._end(is_clean=True)
        except Exception as error:  # noqa: BLE001 - it is raised where the stream is waited for, and not in the loop
            self._end(error)
