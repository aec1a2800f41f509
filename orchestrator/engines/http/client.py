"""HTTP to an inference server: requests, server-sent events, their limits, and what a wrong answer becomes.

Shared by all adapters of servers; it knows nothing of what is said.

Invariants:

* No retries. Errors are those of ``errors``; a request without a stream that outlives its deadline is
  ``EngineStalled``.
* Every line, every answer and every error text is bounded, whatever the server sends.
* Leaving a stream before its end closes its connection. Each request has its own, and streams use one after the other
  where the server bears that.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Annotated, Any, Final, NamedTuple, NoReturn, TypeVar

import aiohttp
import anyio
import msgspec
import orjson

from orchestrator.errors import EngineError, EngineStalled, EngineUnavailable
from orchestrator.schema.keys import read_key

from .errors import Failures, redirected_to, said
from .events import MAX_ERROR_BYTES, Connections, EventStream
from .origin import Origin, OriginUnreachable

__all__ = ["REQUEST_DEADLINE_S", "EngineHttp", "TokenId"]

MAX_ANSWER_BYTES: Final = 64 << 20

REQUEST_DEADLINE_S: Final = 60.0
"""For requests that generate one token or none; they share the server with long generations."""

SPARE_CONNECTIONS: Final = 16
"""For probes, tokenising and aborts beside the generations."""

TokenId = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
"""Samples hold 4 bytes a token."""

T = TypeVar("T")


class Answer(NamedTuple):
    """What came; names of ``headers`` are found in any case."""

    body: bytes
    headers: Mapping[str, str]


class EngineHttp:
    """One server; its connections are made when first needed.

    Args:
        name: of the engine, for errors.
        url: ``http://host:port``.
        kind: of server, as in "a SGLang server".
        max_streams: at a time.
        connect_timeout_s: to connect.
        api_key_env: environment variable with the key of the server, which is never shown; ``None``: it needs none.
        keeps_connections: streams use the connections of earlier ones; not for a server that holds a thread a
            connection.
    """

    def __init__(
        self,
        *,
        name: str,
        url: str,
        kind: str,
        max_streams: int,
        connect_timeout_s: float,
        api_key_env: str | None = None,
        keeps_connections: bool = False,
    ) -> None:
        self.name = name
        self._url = url.rstrip("/")
        self._failures = Failures(name, kind)
        self._connections = max_streams + SPARE_CONNECTIONS
        self._connect_timeout_s = connect_timeout_s
        key, self._key_problem = read_key(api_key_env)
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._origin = Origin(self._url, self._headers, connect_timeout_s=connect_timeout_s, keeps=keeps_connections)
        self._decoders: dict[type, msgspec.json.Decoder[Any]] = {}
        self._session: aiohttp.ClientSession | None = None
        self._is_closed = False
        self._under_way: set[anyio.CancelScope] = set()
        self._streams: set[EventStream[Any]] = set()
        self._stream_connections = Connections(
            connect=self._connect,
            left=self._streams.discard,
            keep=self._origin.kept.put if self._origin.kept is not None else None,
        )

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                # A connection a request: the servers end idle ones after 5 s, which a request that is just being sent
                # on one would take for a failure; and an abort must never wait behind the stream that it ends.
                connector=aiohttp.TCPConnector(limit=self._connections, force_close=True),
                cookie_jar=aiohttp.DummyCookieJar(),  # a cookie could tie all requests to one server behind a router
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._connect_timeout_s),
            )
        return self._session

    async def aclose(self) -> None:
        """Close all connections, for good; what is under way ends with ``EngineUnavailable``."""
        self._is_closed = True
        for stream in list(self._streams):
            stream.fail(self._closed())
        self._origin.close()
        for scope in self._under_way:  # a session that closes leaves its readers waiting
            scope.cancel()
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    def _closed(self) -> EngineUnavailable:
        return self._failures.unavailable("its connections were closed")

    def _check_usable(self) -> None:
        if self._key_problem is not None:
            raise self._failures.unavailable(self._key_problem)
        if self._is_closed:
            raise self._closed()

    # -- requests ------------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _request(self, path: str, data: bytes | None) -> AsyncIterator[aiohttp.ClientResponse]:
        self._check_usable()
        scope = anyio.CancelScope()
        self._under_way.add(scope)
        try:
            with scope:
                async with self._exchange(path, data) as response:
                    yield response
                return
        finally:
            self._under_way.discard(scope)
        raise self._closed()

    @asynccontextmanager
    async def _exchange(self, path: str, data: bytes | None) -> AsyncIterator[aiohttp.ClientResponse]:
        method = "GET" if data is None else "POST"
        try:
            async with self._open().request(
                method, self._url + path, data=data, headers=self._headers, allow_redirects=False
            ) as response:
                if response.status != 200:
                    await self._refuse(path, response)
                yield response
        except EngineError:
            raise
        except Exception as error:  # whatever the library raises costs this engine alone
            raise self._failures.unavailable(f"{path}: {said(error)}") from error

    async def _refuse(self, path: str, response: aiohttp.ClientResponse) -> None:
        if 300 <= response.status < 400 and (location := response.headers.get("Location")):
            raise self._failures.of_answer(path, response.status, redirected_to(location))
        text = b""
        with anyio.move_on_after(self._connect_timeout_s):
            text = await response.content.read(MAX_ERROR_BYTES)
        raise self._failures.of_answer(path, response.status, text)

    def refuse(self, status: int, message: str) -> NoReturn:
        """Raise what an event of a stream that speaks of an error becomes.

        Raises:
            EngineRejected, EngineUnavailable: by its status.
        """
        raise self._failures.of_status(status, message, "event_status")

    def wrong(self, path: str, problem: object) -> EngineUnavailable:
        """The error of an answer that cannot be one."""
        return self._failures.wrong(path, problem)

    # -- answers -------------------------------------------------------------------------------------------------------

    async def ask(self, path: str, into: type[T], body: Any = None, *, deadline_s: float = REQUEST_DEADLINE_S) -> T:
        """A POST of ``body``, or a GET without one, that answers with JSON of the type ``into``.

        Raises:
            EngineRejected, EngineUnavailable, EngineStalled: see the module's invariants.
        """
        text = await self.ask_raw(path, body, deadline_s=deadline_s)
        try:
            return msgspec.json.decode(str(text, "utf-8"), type=into)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise self.wrong(path, error) from error

    async def ask_raw(self, path: str, body: Any = None, *, deadline_s: float = REQUEST_DEADLINE_S) -> bytes:
        """The bytes of the answer, for those that are no JSON; raises as :meth:`ask` does."""
        return (await self.fetch(path, body, deadline_s=deadline_s, max_bytes=MAX_ANSWER_BYTES)).body

    async def fetch(self, path: str, body: Any = None, *, deadline_s: float, max_bytes: int) -> Answer:
        """The whole answer; raises as :meth:`ask` does."""
        with anyio.move_on_after(deadline_s):
            async with self._request(path, None if body is None else orjson.dumps(body)) as response:
                return Answer(await self._read(path, response, max_bytes), response.headers)
        raise EngineStalled(self.name, f"{path}: no answer within {deadline_s:g} s")

    async def _read(self, path: str, response: aiohttp.ClientResponse, max_bytes: int) -> bytes:
        parts, size = [], 0
        async for part in response.content.iter_any():
            parts.append(part)
            size += len(part)
            if size > max_bytes:
                raise self._failures.unavailable(f"{path}: the answer has more than {max_bytes} bytes")
        return b"".join(parts)

    # -- streams -------------------------------------------------------------------------------------------------------

    async def stream(self, path: str, into: type[T], body: Any, on_event: Callable[[T], bool]) -> None:
        """Hand over the events of a POST, until one was enough or there are no more; see ``events``.

        It has no deadline: the caller sets one.

        Raises:
            EngineRejected, EngineUnavailable: see the module's invariants; or what ``on_event`` raises.
        """
        with await self.begin_stream(path, into, body, on_event) as stream:
            del body  # as Python's objects it is ten times as large, and the stream may take minutes
            await stream.ended()

    async def begin_stream(self, path: str, into: type[T], body: Any, on_event: Callable[[T], bool]) -> EventStream[T]:
        """Send the request of a stream, which the caller leaves; for those who have to do with it before its end.

        Raises:
            EngineUnavailable: there is no connection.
        """
        self._check_usable()
        stream = EventStream(
            self._failures,
            path,
            self._origin.request(path, orjson.dumps(body)),
            self._decoder(into),
            on_event,
            connections=self._stream_connections,
            error_s=self._connect_timeout_s,
        )
        self._streams.add(stream)
        kept = self._origin.kept.take() if self._origin.kept is not None else None
        if kept is not None:
            stream.adopt(kept)
        else:
            await self._connect(stream)
        return stream

    async def _connect(self, stream: EventStream[Any]) -> None:
        try:
            await self._origin.connect(stream)
        except OriginUnreachable as error:
            stream.fail(self._failures.unavailable(f"{stream.path}: {error}"))
        except Exception as error:  # noqa: BLE001 - see _exchange; it is raised where the stream is waited for
            stream.fail(self._failures.unavailable(f"{stream.path}: {said(error)}"))
        except BaseException:
            stream.close()
            raise

    def _decoder(self, into: type[T]) -> msgspec.json.Decoder[T]:
        decoder = self._decoders.get(into)
        if decoder is None:
            decoder = self._decoders[into] = msgspec.json.Decoder(into)
        return decoder
