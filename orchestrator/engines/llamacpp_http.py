"""HTTP to a llama.cpp server: requests, their limits, and what a wrong answer becomes.

Invariants:

* No retries. A 4xx answer is ``EngineRejected``; a request without a stream that outlives its deadline
  ``EngineStalled``; everything else that is not the answer asked for ``EngineUnavailable``, saying what was wrong.
* Every line, every answer and every error text is bounded, whatever the server sends.
* Leaving a stream closes its connection, which frees the server's slot.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any, Final

import aiohttp
import anyio
import msgspec
import orjson

from orchestrator.errors import EngineRejected, EngineStalled, EngineUnavailable

__all__ = ["Chunk", "LlamaCppHttp", "Probability", "TokenId"]

MAX_LINE_BYTES: Final = 16 << 20
"""The last line of a stream repeats the prompt; a million tokens of it fit."""

MAX_ANSWER_BYTES: Final = 64 << 20
"""The log-probabilities of a whole vocabulary of 256 thousand tokens take some 20 MB of JSON."""

MAX_ERROR_BYTES: Final = 4096

REQUEST_DEADLINE_S: Final = 60.0
"""For requests that generate one token or none; they share the server with long generations."""

SPARE_CONNECTIONS: Final = 4
"""For probes and tokenising beside the generations."""

LOWEST_PROBABILITY: Final = 1e-38
"""A sampled token whose probability was rounded to 0 gets a finite log-probability."""


TokenId = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
"""Samples hold 4 bytes a token."""


class Probability(msgspec.Struct):
    """One token with its (log-)probability: ``logprob`` raw, ``prob`` after sampling."""

    id: int
    logprob: float | None = None
    prob: float | None = None
    top_logprobs: list[Probability] = []

    @property
    def value(self) -> float:
        """The log-probability, whichever of the two was given."""
        if self.logprob is not None:
            return self.logprob
        return math.log(max(self.prob or 0.0, LOWEST_PROBABILITY))


class _Problem(msgspec.Struct):
    code: int = 500
    message: str = "no message"


class Chunk(msgspec.Struct):
    """What is used of an event of a stream, or of an answer without one."""

    content: str = ""
    tokens: list[TokenId] = []
    tokens_predicted: int = 0
    completion_probabilities: list[Probability] = []
    stop: bool = False
    stop_type: str = ""
    error: _Problem | None = None


_decode = msgspec.json.Decoder(Chunk).decode


class LlamaCppHttp:
    """One server; its connections are made when first needed.

    Args:
        name: of the engine, for errors.
        url: ``http://host:port``.
        max_streams: at a time.
        connect_timeout_s: to connect.
    """

    def __init__(self, *, name: str, url: str, max_streams: int, connect_timeout_s: float) -> None:
        self.name = name
        self._url = url.rstrip("/")
        self._connections = max_streams + SPARE_CONNECTIONS
        self._connect_timeout_s = connect_timeout_s
        self._session: aiohttp.ClientSession | None = None
        self._is_closed = False
        self._under_way: set[anyio.CancelScope] = set()

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                # A connection a request: the server ends idle ones after 5 s or 100 requests, which a request that is
                # just being sent on one would take for a failure, and an idle one holds one of its few threads.
                connector=aiohttp.TCPConnector(limit=self._connections, force_close=True),
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

    @asynccontextmanager
    async def _request(self, method: str, path: str, body: Any = None) -> AsyncIterator[aiohttp.ClientResponse]:
        scope = anyio.CancelScope()
        if not self._is_closed:
            self._under_way.add(scope)
            try:
                with scope:
                    async with self._exchange(method, path, body) as response:
                        yield response
                    return
            finally:
                self._under_way.discard(scope)
        raise EngineUnavailable(self.name, "its connections were closed")

    @asynccontextmanager
    async def _exchange(self, method: str, path: str, body: Any) -> AsyncIterator[aiohttp.ClientResponse]:
        data = None if body is None else orjson.dumps(body)
        headers = {"Content-Type": "application/json"}
        try:
            async with self._open().request(method, self._url + path, data=data, headers=headers) as response:
                if response.status != 200:
                    await self._refuse(path, response)
                yield response
        except (aiohttp.ClientError, ConnectionError) as error:
            raise EngineUnavailable(self.name, f"{path}: {error or type(error).__name__}") from error

    async def _refuse(self, path: str, response: aiohttp.ClientResponse) -> None:
        with anyio.move_on_after(self._connect_timeout_s):
            text = (await response.content.read(MAX_ERROR_BYTES)).decode("utf-8", "replace")
            self._raise(response.status, f"{path}: {_message_of(text)}")
        self._raise(response.status, f"{path}: the text of the error did not come")

    def _raise(self, status: int, message: str) -> None:
        if 400 <= status < 500:
            raise EngineRejected(self.name, f"{status}: {message}", data={"status": status})
        raise EngineUnavailable(self.name, f"{status}: {message}")

    # -- answers -------------------------------------------------------------------------------------------------------

    async def ask(
        self, path: str, body: Any = None, *, deadline_s: float = REQUEST_DEADLINE_S, fields: tuple[str, ...] = ()
    ) -> dict[str, Any]:
        """A POST of ``body``, or a GET without one, that gives a JSON object with at least these ``fields``.

        Raises:
            EngineRejected, EngineUnavailable, EngineStalled: see the module's invariants.
        """
        with anyio.move_on_after(deadline_s):
            async with self._request("GET" if body is None else "POST", path, body) as response:
                answer = self._object(path, await self._read(path, response))
            for name in fields:
                if name not in answer:
                    raise EngineUnavailable(self.name, f"{path}: the answer has no {name!r}: is it a llama.cpp server?")
            return answer
        raise EngineStalled(self.name, f"{path}: no answer within {deadline_s:g} s")

    async def complete(self, body: dict[str, Any], *, deadline_s: float = REQUEST_DEADLINE_S) -> Chunk:
        """``/completion`` without a stream; raises as :meth:`ask` does."""
        answer = await self.ask("/completion", body | {"stream": False}, deadline_s=deadline_s)
        try:
            return msgspec.convert(answer, Chunk)
        except msgspec.ValidationError as error:
            raise EngineUnavailable(self.name, f"/completion: not what a llama.cpp server answers: {error}") from error

    async def _read(self, path: str, response: aiohttp.ClientResponse) -> bytes:
        parts, size = [], 0
        async for part in response.content.iter_any():
            parts.append(part)
            size += len(part)
            if size > MAX_ANSWER_BYTES:
                raise EngineUnavailable(self.name, f"{path}: an answer of more than {MAX_ANSWER_BYTES} bytes")
        return b"".join(parts)

    def _object(self, path: str, text: bytes) -> dict[str, Any]:
        try:
            answer = orjson.loads(text)
        except orjson.JSONDecodeError as error:
            raise EngineUnavailable(self.name, f"{path}: the answer is not JSON: {error}") from error
        if not isinstance(answer, dict):
            raise EngineUnavailable(self.name, f"{path}: the answer is not a JSON object")
        return answer

    # -- streams -------------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def stream(self, body: dict[str, Any]) -> AsyncIterator[AsyncIterator[Chunk]]:
        """The events of ``/completion``; raises as :meth:`ask` does, but has no deadline: the caller sets one."""
        async with self._request("POST", "/completion", body | {"stream": True}) as response:
            yield self._chunks(response)

    async def _chunks(self, response: aiohttp.ClientResponse) -> AsyncIterator[Chunk]:
        async for line in self._lines(response):
            if line == b"[DONE]":
                return
            try:
                chunk = _decode(line)
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                raise EngineUnavailable(self.name, f"not what a llama.cpp server streams: {error}") from error
            if chunk.error is not None:
                self._raise(chunk.error.code, chunk.error.message)
            yield chunk

    async def _lines(self, response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        """The data of server-sent events."""
        rest = bytearray()
        async for part in response.content.iter_any():
            rest += part
            if b"\n" in part:
                *lines, rest = rest.split(b"\n")
                for line in lines:
                    if line.startswith(b"data: "):
                        yield bytes(line[6:])
                    elif line.startswith(b"error: "):
                        raise EngineUnavailable(self.name, f"the stream says {line[7:200].decode(errors='replace')}")
            if len(rest) > MAX_LINE_BYTES:
                raise EngineUnavailable(self.name, f"a line of more than {MAX_LINE_BYTES} bytes")


def _message_of(text: str) -> str:
    """The message of an error answer."""
    try:
        error = orjson.loads(text).get("error", {})
        return str(error.get("message", text)) if isinstance(error, dict) else str(error)
    except (orjson.JSONDecodeError, AttributeError):
        return text.strip()[:300] or "no message"
