"""HTTP to an inference server: requests, server-sent events, their limits, and what a wrong answer becomes.

Shared by all adapters of servers; it knows nothing of what is said.

Invariants:

* No retries. A 4xx answer is ``EngineRejected``, except those that ask to come again later (408, 425, 429); a request
  without a stream that outlives its deadline is ``EngineStalled``; everything else that is not the answer asked for is
  ``EngineUnavailable``. ``data`` of an error holds the ``status`` of a request that was refused before it began, or the
  ``event_status`` of a stream that the server itself ended with an error.
* Every line, every answer and every error text is bounded, whatever the server sends.
* Leaving a stream closes its connection: each request has its own.
* A wait for the next event may be cancelled and begun again: nothing that came is lost by that.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Annotated, Any, Final, Generic, NamedTuple, NoReturn, Self, TypeVar

import aiohttp
import anyio
import msgspec
import orjson

from orchestrator.errors import EngineRejected, EngineStalled, EngineUnavailable

__all__ = ["REQUEST_DEADLINE_S", "EngineHttp", "TokenId"]

MAX_LINE_BYTES: Final = 64 << 20
"""A cumulative event repeats the whole response with its log-probabilities: a million tokens at 50 bytes fit."""

MAX_ANSWER_BYTES: Final = 64 << 20
MAX_ERROR_BYTES: Final = 4096

REQUEST_DEADLINE_S: Final = 60.0
"""For requests that generate one token or none; they share the server with long generations."""

SPARE_CONNECTIONS: Final = 16
"""For probes, tokenising and aborts beside the generations."""

COME_AGAIN: Final = frozenset({408, 425, 429})
"""4xx answers that do not speak of what was asked for, but of when."""

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
    ) -> None:
        self.name = name
        self._url = url.rstrip("/")
        self._kind = kind
        self._connections = max_streams + SPARE_CONNECTIONS
        self._connect_timeout_s = connect_timeout_s
        key = os.environ.get(api_key_env) if api_key_env is not None else None
        self._missing_key = api_key_env if not key else None
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._session: aiohttp.ClientSession | None = None
        self._is_closed = False
        self._under_way: set[anyio.CancelScope] = set()

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
        for scope in self._under_way:  # a session that closes leaves its readers waiting
            scope.cancel()
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    # -- requests ------------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _request(self, path: str, data: bytes | None) -> AsyncIterator[aiohttp.ClientResponse]:
        if self._missing_key is not None:
            raise EngineUnavailable(self.name, f"the environment variable {self._missing_key} holds no key")
        scope = anyio.CancelScope()
        if not self._is_closed:
            self._under_way.add(scope)
            try:
                with scope:
                    async with self._exchange(path, data) as response:
                        yield response
                    return
            finally:
                self._under_way.discard(scope)
        raise EngineUnavailable(self.name, "its connections were closed")

    @asynccontextmanager
    async def _exchange(self, path: str, data: bytes | None) -> AsyncIterator[aiohttp.ClientResponse]:
        method = "GET" if data is None else "POST"
        try:
            async with self._open().request(method, self._url + path, data=data, headers=self._headers) as response:
                if response.status != 200:
                    await self._refuse(path, response)
                yield response
        except EngineUnavailable:  # a ConnectionError too
            raise
        except (aiohttp.ClientError, ConnectionError) as error:
            raise EngineUnavailable(self.name, f"{path}: {_said(error)}") from error

    async def _refuse(self, path: str, response: aiohttp.ClientResponse) -> None:
        with anyio.move_on_after(self._connect_timeout_s):
            text = (await response.content.read(MAX_ERROR_BYTES)).decode("utf-8", "replace")
            self._raise(response.status, f"{path}: {_message_of(text)}", "status")
        self._raise(response.status, f"{path}: the text of the error did not come", "status")

    def refuse(self, status: int, message: str) -> NoReturn:
        """Raise what an event of a stream that speaks of an error becomes.

        Raises:
            EngineRejected, EngineUnavailable: by its status.
        """
        self._raise(status, message, "event_status")

    def _raise(self, status: int, message: str, key: str) -> NoReturn:
        kind = EngineRejected if 400 <= status < 500 and status not in COME_AGAIN else EngineUnavailable
        raise kind(self.name, f"{status}: {message}", data={key: status})

    def wrong(self, path: str, problem: object) -> EngineUnavailable:
        """The error of an answer that cannot be one."""
        return EngineUnavailable(self.name, f"{path}: not what a {self._kind} answers: {problem}")

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
                raise EngineUnavailable(self.name, f"{path}: an answer of more than {max_bytes} bytes")
        return b"".join(parts)

    # -- streams -------------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def stream(self, path: str, into: type[T], body: Any) -> AsyncIterator[AsyncIterator[T]]:
        """The events of a POST, up to ``[DONE]``; it has no deadline: the caller sets one.

        Raises:
            EngineRejected, EngineUnavailable: see the module's invariants; on entering for the answer's status.
        """
        data = orjson.dumps(body)
        del body  # as Python's objects it is ten times as large, and the stream may take minutes
        async with self._request(path, data) as response:
            yield _Events(self, path, msgspec.json.Decoder(into), response.content)


class _Events(Generic[T]):
    """The events of one stream; its state is here and in no frame, so that a cancelled wait loses none of it."""

    def __init__(
        self, http: EngineHttp, path: str, decoder: msgspec.json.Decoder[T], content: aiohttp.StreamReader
    ) -> None:
        self._http = http
        self._path = path
        self._decoder = decoder
        self._content = content
        self._lines: deque[bytes] = deque()
        self._rest = bytearray()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        while True:
            while not self._lines:
                await self._receive()
            line = self._lines.popleft()
            if line.startswith(b"data:"):
                return self._event(line[5:].strip())
            if line.startswith(b"error:"):
                words = line[6:300].decode(errors="replace").strip()
                raise EngineUnavailable(self._http.name, f"{self._path}: {words}")

    def _event(self, data: bytes) -> T:
        if data == b"[DONE]":
            raise StopAsyncIteration
        try:
            # Strictly: msgspec passes over keys that it does not know.
            return self._decoder.decode(data if data.isascii() else str(data, "utf-8"))
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise self._http.wrong(self._path, error) from error

    async def _receive(self) -> None:
        """Some more lines, or none yet; raises ``StopAsyncIteration`` at the end."""
        try:
            part = await self._content.readany()
        except (aiohttp.ClientError, ConnectionError, RuntimeError) as error:  # the last: it was closed here
            raise EngineUnavailable(self._http.name, f"{self._path}: {_said(error)}") from error
        if not part:
            raise StopAsyncIteration
        if b"\n" in part:
            *lines, rest = (bytes(self._rest) + part if self._rest else part).split(b"\n")
            self._lines.extend(lines)
            self._rest = bytearray(rest)
        else:
            self._rest += part
        if len(self._rest) > MAX_LINE_BYTES:
            raise EngineUnavailable(self._http.name, f"{self._path}: a line of more than {MAX_LINE_BYTES} bytes")


def _said(error: Exception) -> str:
    """What went wrong with a connection, in words of ours: those of the library name its own parts."""
    reason = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    detail = getattr(reason, "strerror", None) or str(reason).partition("[")[0] or type(reason).__name__
    if isinstance(error, aiohttp.ClientConnectorError):
        return f"cannot connect: {detail}"
    if isinstance(error, aiohttp.ClientPayloadError):
        return "the connection ended in the middle of the answer"
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return "the server disconnected without an answer"
    return str(detail)


def _message_of(text: str) -> str:
    """The message of an error answer, in any of the forms that servers give it."""
    try:
        answer = orjson.loads(text)
    except orjson.JSONDecodeError:
        return text.strip()[:300] or "no message"
    if isinstance(answer, dict):
        error = answer.get("error", answer)
        found = error.get("message", error.get("detail")) if isinstance(error, dict) else error
        if found:
            return str(found)
    return text.strip()[:300] or "no message"
