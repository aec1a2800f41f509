"""The llama.cpp server: ``/completion`` by token ids, streamed.

Log-probabilities are of the distribution after temperature and before truncation. At temperature 1 that is what the
server reports as raw. At other temperatures it is what it reports after sampling, as long as nothing truncates; with
truncation the server cannot give it, and :meth:`LlamaCppEngine.supports` says so unless ``logprobs`` is ``raw``.

Invariants:

* What was streamed is handed over as it arrives; nothing is taken back. Closing the connection frees the slot.
* A stream leaves out tokens while the text ends in incomplete UTF-8. The gap is seen by the server's own count, and
  closed by ``llamacpp_gaps`` before anything after it is handed over.
* No retries here. A 4xx answer is ``EngineRejected``, everything else that is wrong ``EngineUnavailable``.
* Every line is bounded, every request without a stream has a deadline; the pool bounds streams.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import aiohttp
import anyio
import msgspec
import orjson
from anyio.abc import TaskStatus

from orchestrator.errors import EngineRejected, EngineUnavailable
from orchestrator.records import Message

from .llamacpp_gaps import Chunk, Piece, fill_gap
from .port import EngineInfo, GenerationEnd, GenerationRequest, SamplingParams, TokenSink

__all__ = ["LlamaCppEngine"]

MAX_LINE_BYTES: Final = 16 << 20
"""The last line of a stream repeats the prompt; a million tokens of it fit."""

REQUEST_DEADLINE_S: Final = 60.0
"""For requests without a stream that generate nothing: tokenising, properties."""

SPARE_CONNECTIONS: Final = 4
"""For probes and tokenising beside the generations."""

_decode = msgspec.json.Decoder(Chunk).decode


@dataclass(slots=True)
class _Received:
    """What a stream has given: the token ids, and its last chunk if it came."""

    tokens: list[int] = field(default_factory=list)
    last: Chunk | None = None


class LlamaCppEngine:
    """See the module's docstring.

    Args:
        name: unique among the engines.
        url: ``http://host:port``.
        max_in_flight: requests at a time; the server's number of slots is right.
        logprobs: ``temperature`` or ``raw``, see the module's docstring.
        connect_timeout_s: to connect.
    """

    def __init__(
        self,
        *,
        name: str,
        url: str,
        max_in_flight: int = 16,
        logprobs: Literal["temperature", "raw"] = "temperature",
        connect_timeout_s: float = 5.0,
    ) -> None:
        self.name = name
        self.max_in_flight = max_in_flight
        self.url = url.rstrip("/")
        self._logprobs: Literal["temperature", "raw"] = logprobs
        self._connect_timeout_s = connect_timeout_s
        self._session: aiohttp.ClientSession | None = None

    # -- HTTP ----------------------------------------------------------------------------------------------------------

    def _http(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                # A connection a request: the server ends idle ones after 5 s or 100 requests, which a request that is
                # just being sent on one would take for a failure, and an idle one holds one of its few threads.
                connector=aiohttp.TCPConnector(limit=self.max_in_flight + SPARE_CONNECTIONS, force_close=True),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._connect_timeout_s),
            )
        return self._session

    @asynccontextmanager
    async def _request(self, method: str, path: str, body: Any = None) -> AsyncIterator[aiohttp.ClientResponse]:
        """A request whose answer is 200.

        Raises:
            EngineRejected: the answer is a 4xx.
            EngineUnavailable: anything else that is not an answer.
        """
        data = None if body is None else orjson.dumps(body)
        headers = {"Content-Type": "application/json"}
        try:
            async with self._http().request(method, self.url + path, data=data, headers=headers) as response:
                if response.status != 200:
                    text = (await response.content.read(4096)).decode("utf-8", "replace")
                    self._refuse(response.status, _error_message(text))
                yield response
        except (aiohttp.ClientError, ConnectionError) as error:
            raise EngineUnavailable(self.name, f"{path}: {error or type(error).__name__}") from error
        except TimeoutError as error:
            raise EngineUnavailable(self.name, f"{path}: cannot connect in {self._connect_timeout_s:g} s") from error

    def _refuse(self, status: int, message: str) -> None:
        if 400 <= status < 500:
            raise EngineRejected(self.name, f"{status}: {message}", data={"status": status})
        raise EngineUnavailable(self.name, f"{status}: {message}")

    async def ask(self, path: str, body: Any) -> Any:
        """A POST that gives JSON; raises as :meth:`_request` does."""
        async with self._request("POST", path, body) as response:
            return await self._json(response, path)

    async def _json(self, response: aiohttp.ClientResponse, path: str) -> Any:
        try:
            return orjson.loads(await response.read())
        except ValueError as error:
            raise EngineUnavailable(self.name, f"{path}: the answer is not JSON: {error}") from error

    # -- the port ------------------------------------------------------------------------------------------------------

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """Nothing to own."""
        task_status.started()

    async def probe(self) -> EngineInfo:
        """``/health`` and ``/props``; raises ``EngineUnavailable``."""
        try:
            async with self._request("GET", "/health") as response:
                await response.read()
            async with self._request("GET", "/props") as response:
                props = await self._json(response, "/props")
        except EngineRejected as error:
            raise EngineUnavailable(self.name, f"it is no llama.cpp server: {error.message}") from error
        context = props.get("default_generation_settings", {}).get("n_ctx")
        model = str(props.get("model_alias") or props.get("model_path") or "unknown")
        return EngineInfo(model=model, context_tokens=context, logprobs=self._logprobs)

    def supports(self, sampling: SamplingParams) -> str | None:
        """Why these parameters cannot be used with these log-probabilities; ``None`` if they can."""
        truncates = sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0
        if self._logprobs == "temperature" and sampling.temperature not in (0, 1) and truncates:
            return (
                "a llama.cpp server cannot give log-probabilities after temperature and before truncation:"
                " switch top_k, top_p and min_p off, or set logprobs: raw on this engine"
            )
        return None

    async def tokenize(self, text: str) -> list[int]:
        """``/tokenize``, with the special tokens that a text begins with."""
        return await self._tokenize({"content": text, "add_special": True, "parse_special": False})

    async def tokenize_chat(self, messages: Sequence[Message], template_kwargs: dict[str, Any]) -> list[int]:
        """``/apply-template``, then ``/tokenize`` (the template writes the special tokens itself)."""
        body = {"messages": list(messages), "chat_template_kwargs": template_kwargs}
        with anyio.fail_after(REQUEST_DEADLINE_S):
            prompt = (await self.ask("/apply-template", body))["prompt"]
        return await self._tokenize({"content": prompt, "add_special": False, "parse_special": True})

    async def _tokenize(self, body: dict[str, Any]) -> list[int]:
        with anyio.fail_after(REQUEST_DEADLINE_S):
            tokens = (await self.ask("/tokenize", body)).get("tokens")
        if not isinstance(tokens, list):
            raise EngineUnavailable(self.name, "/tokenize gave no token ids")
        return tokens

    async def detokenize(self, tokens: Sequence[int]) -> str:
        """``/detokenize``."""
        with anyio.fail_after(REQUEST_DEADLINE_S):
            return str((await self.ask("/detokenize", {"tokens": list(tokens)})).get("content", ""))

    async def aclose(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    # -- generation ----------------------------------------------------------------------------------------------------

    async def generate(self, request: GenerationRequest, sink: TokenSink) -> GenerationEnd:
        """Stream a piece; see the port."""
        body = self.body(request)
        received = _Received()
        gap_at = await self._stream(body, request, received, sink)
        if gap_at is not None:
            piece = await fill_gap(self, body, received.tokens)
            return self._hand_over(piece, len(received.tokens), request, sink)
        last = received.last
        if last is None:
            if received.tokens and received.tokens[-1] in request.sampling.stop_token_ids:
                return GenerationEnd("stop")
            raise EngineUnavailable(self.name, "the stream ended before the generation did")
        return GenerationEnd("length" if last.stop_type in ("limit", "none", "") else "stop")

    def body(self, request: GenerationRequest) -> dict[str, Any]:
        """The JSON of a ``/completion`` request."""
        sampling = request.sampling
        samplers = [
            name
            for name, is_on in (
                ("top_k", sampling.top_k > 0),
                ("top_p", sampling.top_p < 1),
                ("min_p", sampling.min_p > 0),
            )
            if is_on
        ]
        return {
            "prompt": list(request.tokens),
            "n_predict": request.max_new_tokens,
            "seed": request.seed if request.seed is not None else 0xFFFFFFFF,
            "temperature": sampling.temperature,
            # temperature first: what truncates then looks at the distribution that is sampled from
            "samplers": ["temperature", *samplers],
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "repeat_penalty": 1.0,
            "stop": list(sampling.stop),
            "n_probs": 1,
            "post_sampling_probs": self._is_adjusted(sampling),
            "return_tokens": True,
            "cache_prompt": True,
            "stream": True,
        }

    def _is_adjusted(self, sampling: SamplingParams) -> bool:
        """Whether log-probabilities have to be those after sampling; greedy ones are raw, being 0 or nothing else."""
        return self._logprobs == "temperature" and sampling.temperature not in (0, 1)

    async def _stream(
        self, body: dict[str, Any], request: GenerationRequest, received: _Received, sink: TokenSink
    ) -> int | None:
        """Hand over what is streamed; returns where tokens were left out, ``None`` if the stream ended whole."""
        stops = frozenset(request.sampling.stop_token_ids)
        async with self._request("POST", "/completion", body) as response:
            async for line in self._lines(response):
                chunk = self._chunk(line)
                if chunk is None:
                    continue
                if chunk.tokens_predicted != len(received.tokens) + len(chunk.tokens):
                    return len(received.tokens)
                if chunk.tokens:
                    received.tokens += chunk.tokens
                    sink(chunk.tokens, self._logprobs_of(chunk), chunk.content)
                    if stops and not stops.isdisjoint(chunk.tokens):
                        return None
                elif chunk.content:
                    sink((), (), chunk.content)
                if chunk.stop:
                    received.last = chunk
                    return None
        return None

    async def _lines(self, response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        """The data of server-sent events."""
        rest = b""
        async for part in response.content.iter_any():
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                if line.startswith(b"data: "):
                    yield line[6:]
                elif line.startswith(b"error: "):
                    raise EngineUnavailable(self.name, f"the stream says {line[7:200].decode(errors='replace')}")
            if len(rest) > MAX_LINE_BYTES:
                raise EngineUnavailable(self.name, f"a line of more than {MAX_LINE_BYTES} bytes")

    def _chunk(self, line: bytes) -> Chunk | None:
        if line == b"[DONE]":
            return None
        try:
            chunk = _decode(line)
        except msgspec.MsgspecError as error:
            raise EngineUnavailable(self.name, f"the stream is not what a llama.cpp server sends: {error}") from error
        if chunk.error is not None:
            self._refuse(int(chunk.error.get("code", 500)), str(chunk.error.get("message", chunk.error)))
        return chunk

    def _logprobs_of(self, chunk: Chunk) -> list[float]:
        entries = chunk.completion_probabilities
        if len(entries) != len(chunk.tokens):
            raise EngineUnavailable(self.name, f"{len(chunk.tokens)} tokens came with {len(entries)} log-probabilities")
        return [entry.value for entry in entries]

    def _hand_over(self, piece: Piece, known: int, request: GenerationRequest, sink: TokenSink) -> GenerationEnd:
        """What the gap and all after it turned out to be."""
        tokens, logprobs = piece.tokens[known:], piece.logprobs[known:]
        stops = [i for i, token in enumerate(tokens) if token in request.sampling.stop_token_ids]
        if stops:
            tokens, logprobs = tokens[: stops[0] + 1], logprobs[: stops[0] + 1]
        sink(tokens, logprobs, "")
        is_stop = bool(stops) or piece.stop_type not in ("limit", "none", "")
        return GenerationEnd("stop" if is_stop else "length", text_complete=False)


def _error_message(text: str) -> str:
    """The message of an error answer."""
    try:
        error = orjson.loads(text).get("error", {})
        return str(error.get("message", text)) if isinstance(error, dict) else str(error)
    except (ValueError, AttributeError):
        return text.strip()[:300] or "no message"
