"""The llama.cpp server: ``/completion`` by token ids, streamed.

Log-probabilities are of the distribution after temperature and before truncation. At temperature 1 that is what the
server reports as raw. At other temperatures it is what it reports after sampling, as long as nothing truncates; with
truncation the server cannot give it, and :meth:`LlamaCppEngine.supports` says so unless ``logprobs`` is ``raw``.

A stream leaves out tokens while the text ends in incomplete UTF-8. The gap is seen by the server's own count. The
stream is then left, the gap is closed (``gaps``), and a new stream goes on after it, with a seed of its own:
the tokens up to there are drawn and handed over, so that what follows may be drawn freshly without bias.

Invariants:

* What was streamed is handed over as it arrives; nothing is taken back, nothing after a gap comes before its tokens.
* Closing the connection frees the slot. The pool bounds how long a stream may be silent.
* No retries here; errors are those of ``http``.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final, Literal

import anyio
from anyio.abc import TaskStatus

from orchestrator.engines.http.client import EngineHttp
from orchestrator.engines.http.instance import ProcessStart
from orchestrator.engines.http.parameters import CANNOT_LOAD
from orchestrator.engines.port import (
    EngineInfo,
    FinishReason,
    GenerationEnd,
    GenerationRequest,
    ParameterUpdate,
    SamplingParams,
    TokenSink,
)
from orchestrator.errors import EngineRejected, EngineUnavailable
from orchestrator.records import Message

from .gaps import missing_tokens, score, signs_of_life
from .text import LlamaCppText
from .wire import Chunk, Props, streamed

__all__ = ["LlamaCppEngine"]

ANY_SEED: Final = 0xFFFFFFFF
"""The server takes it for "draw one"."""

REPEAT_FACTOR: Final = 4.0
REPEAT_MARGIN_S: Final = 15.0
"""A repetition may take this many times as long as its stream took, and so much more on a busy server."""


@dataclass(slots=True)
class _Received:
    """What a stream has given: its token ids, and either why it ended or the event that shows a gap."""

    tokens: list[int] = field(default_factory=list)
    reason: FinishReason | None = None
    after_gap: Chunk | None = None


class LlamaCppEngine:
    """See the module's docstring.

    Args:
        name: unique among the engines.
        url: ``http://host:port``.
        max_in_flight: requests at a time; the server's number of slots is right.
        logprobs: ``temperature`` or ``raw``, see the module's docstring.
        api_key_env: environment variable with the key of the server.
        connect_timeout_s: to connect.
    """

    def __init__(
        self,
        *,
        name: str,
        url: str,
        max_in_flight: int = 16,
        logprobs: Literal["temperature", "raw"] = "temperature",
        api_key_env: str | None = None,
        connect_timeout_s: float = 5.0,
    ) -> None:
        self.name = name
        self.max_in_flight = max_in_flight
        self._logprobs: Literal["temperature", "raw"] = logprobs
        self._http = EngineHttp(
            name=name,
            url=url,
            kind="llama.cpp server",
            max_streams=max_in_flight,
            connect_timeout_s=connect_timeout_s,
            api_key_env=api_key_env,
        )
        self._text = LlamaCppText(self._http)
        self._start = ProcessStart(self._http)
        self._end_ids: set[int] = set()
        self._is_end_asked = False

    # -- the port ------------------------------------------------------------------------------------------------------

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """Nothing to own."""
        task_status.started()

    async def probe(self) -> EngineInfo:
        """``/health`` and ``/props``; raises ``EngineUnavailable`` or ``EngineStalled``."""
        try:
            await self._http.ask_raw("/health")
            props = await self._http.ask("/props", Props)
            await self._ask_for_the_end(props)
        except EngineRejected as error:
            raise EngineUnavailable(self.name, f"it is not a llama.cpp server: {error.message}") from error
        context = props.default_generation_settings.get("n_ctx")
        return EngineInfo(
            model=props.model_alias or props.model_path or "unknown",
            context_tokens=context if isinstance(context, int) else None,
            instance=" ".join(filter(None, (props.model_path, await self._start.ask()))) or None,
            logprobs=self._logprobs,
            end_ids=tuple(sorted(self._end_ids)),
        )

    async def _ask_for_the_end(self, props: Props) -> None:
        """The token that ends a sequence, by its text; others are found out when they do."""
        if not self._is_end_asked and props.eos_token:
            end = await self._text.special(props.eos_token)
            self._end_ids |= {end} if end is not None else set()
        self._is_end_asked = True

    def supports(self, sampling: SamplingParams) -> str | None:
        """Why these parameters cannot be used with these log-probabilities; ``None`` if they can."""
        truncates = sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0
        if self._is_adjusted(sampling) and truncates:
            return (
                "a llama.cpp server cannot give log-probabilities after temperature and before truncation:"
                " turn off top_k, top_p and min_p, or set logprobs: raw on this engine"
            )
        return None

    async def tokenize(self, text: str) -> list[int]:
        """``/tokenize``, with the special tokens that a text begins with."""
        return await self._text.tokenize(text)

    async def tokenize_chat(self, messages: Sequence[Message], template_kwargs: dict[str, Any]) -> list[int]:
        """``/apply-template``, then ``/tokenize``."""
        return await self._text.tokenize_chat(messages, template_kwargs)

    async def detokenize(self, tokens: Sequence[int]) -> str:
        """``/detokenize``, without control tokens."""
        return await self._text.detokenize(tokens)

    async def update_parameters(self, update: ParameterUpdate) -> None:
        """Refused: the server cannot."""
        raise EngineRejected(self.name, CANNOT_LOAD)

    async def aclose(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    # -- generation ----------------------------------------------------------------------------------------------------

    async def generate(self, request: GenerationRequest, sink: TokenSink) -> GenerationEnd:
        """Stream a piece; see the port."""
        had_gap = False
        while True:
            began = anyio.current_time()
            received = await self._stream(request, sink)
            if received.after_gap is not None:
                had_gap = True
                await self._close_gap(request, received, received.after_gap, anyio.current_time() - began, sink)
            if received.reason is not None:
                # Text that might have become a stop text is held back by the server, and lost at the end.
                is_complete = not had_gap and not (received.reason == "length" and request.sampling.stop)
                return GenerationEnd(received.reason, text_complete=is_complete)
            request = _after(request, received.tokens)

    def body(self, request: GenerationRequest) -> dict[str, Any]:
        """The JSON of a ``/completion`` request."""
        sampling = request.sampling
        truncations = {"top_k": sampling.top_k > 0, "top_p": sampling.top_p < 1, "min_p": sampling.min_p > 0}
        return {
            "prompt": list(request.tokens),
            "n_predict": request.max_new_tokens,
            "seed": request.seed if request.seed is not None else ANY_SEED,
            "temperature": sampling.temperature,
            # temperature first: what truncates then looks at the distribution that is sampled from
            "samplers": ["temperature", *(name for name, is_on in truncations.items() if is_on)],
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "repeat_penalty": 1.0,
            "stop": list(sampling.stop),
            "n_probs": 1,
            "post_sampling_probs": self._is_adjusted(sampling),
            "return_tokens": True,
            "cache_prompt": True,
        }

    def _is_adjusted(self, sampling: SamplingParams) -> bool:
        """Whether log-probabilities have to be those after sampling; greedy ones are raw, being 0 or nothing else."""
        return self._logprobs == "temperature" and sampling.temperature not in (0, 1)

    async def _stream(self, request: GenerationRequest, sink: TokenSink) -> _Received:
        """Hand over what is streamed, up to the end or a gap."""
        received = _Received()
        await streamed(self._http, self.body(request), partial(self._take, request, received, sink))
        if received.reason is None and received.after_gap is None:
            raise EngineUnavailable(self.name, "the stream ended before the generation did")
        return received

    def _take(self, request: GenerationRequest, received: _Received, sink: TokenSink, chunk: Chunk) -> bool:
        """Hand over what an event adds; whether that is the end, or a gap."""
        if chunk.tokens_predicted != len(received.tokens) + len(chunk.tokens):
            received.after_gap = chunk
            return True
        self._hand_over(request, received, chunk.tokens, self._logprobs_of(chunk), chunk.content, sink)
        if chunk.stop and received.reason is None:
            received.reason = _reason_of(chunk.stop_type)
            self._note_end(chunk.stop_type, received)
        return received.reason is not None

    def _note_end(self, stop_type: str, received: _Received) -> None:
        """A model may have several tokens that end a sequence; the server names one."""
        if stop_type == "eos" and received.tokens:
            self._end_ids.add(received.tokens[-1])

    def _logprobs_of(self, chunk: Chunk) -> list[float]:
        entries = chunk.completion_probabilities if chunk.tokens else []
        if len(entries) != len(chunk.tokens):
            raise EngineUnavailable(self.name, f"got {len(chunk.tokens)} tokens but {len(entries)} log-probabilities")
        return [entry.value for entry in entries]

    @staticmethod
    def _hand_over(
        request: GenerationRequest,
        received: _Received,
        tokens: Sequence[int],
        logprobs: Sequence[float],
        text: str,
        sink: TokenSink,
    ) -> None:
        """To the sink, up to a token that stops."""
        stops = request.sampling.stop_token_ids
        at = next((i for i, token in enumerate(tokens) if token in stops), None) if stops else None
        if at is not None:
            received.reason = "stop"
            tokens, logprobs = tokens[: at + 1], logprobs[: at + 1]
        received.tokens += tokens
        if tokens or text:
            sink(tokens, logprobs, text)

    async def _close_gap(
        self, request: GenerationRequest, received: _Received, after: Chunk, stream_s: float, sink: TokenSink
    ) -> None:
        """Hand over what the stream left out, and the event after it."""
        if after.tokens_predicted < len(received.tokens) + len(after.tokens):
            raise EngineUnavailable(self.name, "the stream counts fewer tokens than it sent")
        after_logprobs = self._logprobs_of(after)
        body, known = self.body(request), received.tokens
        deadline_s = REPEAT_FACTOR * stream_s + REPEAT_MARGIN_S
        async with signs_of_life(sink):
            missing, stop_type = await missing_tokens(self._http, body, known, after, deadline_s=deadline_s)
            logprobs = await score(self._http, body, [*request.tokens, *known], missing)
        tokens, all_logprobs = [*missing, *after.tokens], [*logprobs, *after_logprobs]
        self._hand_over(request, received, tokens, all_logprobs, after.content, sink)
        if received.reason is None:
            reason = _reason_of(stop_type)
            self._note_end(stop_type, received)
            is_over = reason == "stop" or after.stop or len(received.tokens) >= request.max_new_tokens
            received.reason = reason if is_over else None


def _reason_of(stop_type: str) -> FinishReason:
    return "length" if stop_type in ("limit", "none", "") else "stop"


def _after(request: GenerationRequest, tokens: Sequence[int]) -> GenerationRequest:
    """The rest of a request, ``tokens`` of which came."""
    seed = None if request.seed is None else zlib.crc32(f"{request.seed}/{len(tokens)}".encode())
    return replace(
        request,
        tokens=[*request.tokens, *tokens],
        max_new_tokens=request.max_new_tokens - len(tokens),
        generated=request.generated + len(tokens),
        seed=seed,
    )
