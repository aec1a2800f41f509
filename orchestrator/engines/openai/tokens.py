"""OpenAI-compatible servers that give token ids: ``/v1/completions`` by token ids, streamed. vLLM is one.

Training needs the very tokens that were drawn, each with its log-probability. A server that gives text alone cannot be
used: :meth:`OpenAITokens.probe` draws one token and names what is missing.

Log-probabilities are of the distribution after temperature and before truncation, or raw, as the config says. vLLM
gives raw ones; with ``--logprobs-mode processed_logprobs`` it gives those after temperature *and* truncation. Which of
the two it does is found out by a draw that may fall on one token alone, and a request whose log-probabilities would be
others than promised is refused. At temperature 1 without truncation they are all the same.

Invariants:

* What was streamed is handed over as it arrives, each token with its log-probability.
* Closing the connection ends the generation. A paused server is no failed one (``vllm_pause``).
* No retries here; errors are those of ``http``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal

import msgspec
from anyio.abc import TaskStatus

from orchestrator.engines.http.client import EngineHttp
from orchestrator.engines.http.instance import ProcessStart
from orchestrator.engines.http.parameters import CANNOT_LOAD, NO_SUCH_PATH
from orchestrator.engines.port import (
    EngineInfo,
    GenerationEnd,
    GenerationRequest,
    ParameterUpdate,
    SamplingParams,
    TokenSink,
)
from orchestrator.errors import EngineRejected, EngineUnavailable
from orchestrator.records import Message

from .text import OpenAIText
from .vllm_parameters import update_vllm_parameters
from .vllm_pause import Listener, PauseWatch
from .wire import REASONS, TEXT_ALONE, Choice, Event, found_model, refuse

__all__ = ["OpenAITokens"]

CERTAIN: Final = -1e-6
"""A log-probability above this is 0 but for rounding."""


@dataclass(slots=True)
class _Reading:
    """A stream under way: who is told of it, its newest token, and how it ended."""

    listener: Listener
    last: int | None = None
    end: GenerationEnd | None = None


class OpenAITokens:
    """See the module's docstring.

    Args:
        name: unique among the engines.
        url: ``http://host:port``.
        model: to ask for; ``None``: the first of ``/v1/models``.
        max_in_flight: requests at a time; the server queues what it does not run.
        dialect: ``vllm`` or ``generic``.
        logprobs: ``temperature`` or ``raw``, see the module's docstring.
        api_key_env: environment variable with the key of the server.
        connect_timeout_s: to connect.
    """

    def __init__(
        self,
        *,
        name: str,
        url: str,
        model: str | None = None,
        max_in_flight: int = 256,
        dialect: Literal["vllm", "generic"],
        logprobs: Literal["temperature", "raw"] = "temperature",
        api_key_env: str | None = None,
        connect_timeout_s: float = 5.0,
    ) -> None:
        self.name = name
        self.max_in_flight = max_in_flight
        self._model = model
        self._dialect: Literal["vllm", "generic"] = dialect
        self._logprobs: Literal["temperature", "raw"] = logprobs
        self._http = EngineHttp(
            name=name,
            url=url,
            kind="server with token ids",
            max_streams=max_in_flight,
            connect_timeout_s=connect_timeout_s,
            api_key_env=api_key_env,
            keeps_connections=dialect == "vllm",
        )
        self._text = OpenAIText(self._http)
        self._pauses = PauseWatch(self._http)
        self._start = ProcessStart(self._http)
        self._context_tokens: int | None = None
        self._has_token_ids = False
        self._is_processed: bool | None = None
        self._end_ids: set[int] = set()

    # -- the port ------------------------------------------------------------------------------------------------------

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """Watch for pauses of the server while requests hear nothing."""
        task_status.started()
        await self._pauses.run()

    async def probe(self) -> EngineInfo:
        """``/health``, ``/v1/models``; the first time also that it gives token ids.

        Raises:
            EngineUnavailable, EngineStalled: the server cannot be used; the message names what is missing.
        """
        try:
            await self._http.ask_raw("/health")
            model = await found_model(self._http, self._model)
            self._text.model = model.id
            if not self._has_token_ids:
                await self._check_token_ids()
        except EngineRejected as error:
            advice = f"; {TEXT_ALONE}" if error.data.get("status") in NO_SUCH_PATH else ""
            raise EngineUnavailable(self.name, f"it cannot be used: {error.message}{advice}") from error
        self._context_tokens = model.max_model_len
        return EngineInfo(
            model=model.id,
            context_tokens=model.max_model_len,
            instance=await self._start.ask(),
            logprobs=self._logprobs,
            end_ids=tuple(sorted(self._end_ids)),
        )

    async def _check_token_ids(self) -> None:
        """Draw a token, and see what the server tells of it."""
        letter = (await self._text.tokenize("a", add_special=False))[-1:]
        if not letter:
            raise EngineUnavailable(self.name, "its tokenizer has no token for the letter a")
        drawn = await self._text.draw(letter, only=letter[0])
        lacks = [
            *(["token ids (choices[].token_ids, asked for by return_token_ids)"] if drawn.token is None else []),
            *(["log-probabilities (choices[].logprobs.token_logprobs)"] if drawn.logprob is None else []),
        ]
        if drawn.logprob is None or lacks:
            raise EngineUnavailable(
                self.name,
                f"its samples cannot be trained on: its completions have no {' and no '.join(lacks)}; {TEXT_ALONE}",
            )
        if drawn.token == letter[0] and self._dialect == "vllm":
            self._is_processed = drawn.logprob > CERTAIN
        self._has_token_ids = True

    def supports(self, sampling: SamplingParams) -> str | None:
        """Why these parameters cannot be used with these log-probabilities; ``None``: no reason is known."""
        truncates = sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0
        is_warm = sampling.temperature not in (0, 1)
        promises_raw = self._logprobs == "raw"
        if truncates and is_warm and not promises_raw:
            return (
                "it cannot give log-probabilities after temperature and before truncation:"
                " turn off top_k, top_p and min_p, or set logprobs: raw on this engine"
            )
        if self._is_processed is True and (truncates or (is_warm and promises_raw)):
            return (
                "it gives log-probabilities after temperature and truncation, which is not what this config says:"
                " start it without --logprobs-mode processed_logprobs, or turn off truncation and logprobs: raw"
            )
        if self._is_processed is False and is_warm and not promises_raw:
            return (
                "it gives raw log-probabilities: set logprobs: raw on this engine, use temperature 1,"
                " or start it with --logprobs-mode processed_logprobs"
            )
        return None

    async def tokenize(self, text: str) -> list[int]:
        """``/tokenize``, with the special tokens that a text begins with."""
        return await self._text.tokenize(text)

    async def tokenize_chat(self, messages: Sequence[Message], template_kwargs: dict[str, Any]) -> list[int]:
        """``/tokenize`` of chat messages."""
        return await self._text.tokenize_chat(messages, template_kwargs)

    async def detokenize(self, tokens: Sequence[int]) -> str:
        """``/detokenize``, without control tokens."""
        return await self._text.detokenize(tokens)

    async def update_parameters(self, update: ParameterUpdate) -> None:
        """Of a vLLM server: pause, load, forget, resume; see ``vllm_parameters``."""
        if self._dialect != "vllm":
            raise EngineRejected(self.name, CANNOT_LOAD)
        await update_vllm_parameters(self._http, update)

    async def aclose(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    # -- generation ----------------------------------------------------------------------------------------------------

    async def generate(self, request: GenerationRequest, sink: TokenSink) -> GenerationEnd:
        """Stream a piece; see the port. A request that a paused server refuses has not begun: it waits."""
        problem = self.supports(request.sampling)
        if problem is not None:
            raise EngineRejected(self.name, problem)
        return await self._pauses.outlast(lambda: self._stream(request, sink), sink)

    def body(self, request: GenerationRequest) -> dict[str, Any]:
        """The JSON of a ``/v1/completions`` request."""
        sampling = request.sampling
        room = request.max_new_tokens
        if self._context_tokens is not None:  # to be asked for more than fits is refused
            room = max(1, min(room, self._context_tokens - len(request.tokens)))
        return {
            "model": self._text.model or self._model,
            "prompt": list(request.tokens),
            "max_tokens": room,
            "seed": request.seed,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "stop": list(sampling.stop),
            "stop_token_ids": list(sampling.stop_token_ids),
            # neutral, whatever the model's own defaults are
            "frequency_penalty": 0.0,
            "presence_penalty": 0.0,
            "repetition_penalty": 1.0,
            "logprobs": 0 if self._dialect == "vllm" else 1,  # of the drawn token alone, where that can be said
            "return_token_ids": True,
            "stream": True,
        }

    async def _stream(self, request: GenerationRequest, sink: TokenSink) -> GenerationEnd:
        with self._pauses.listening(sink) as listener:
            reading = _Reading(listener)
            take = partial(self._take, reading, request.sampling)
            await self._http.stream("/v1/completions", Event, self.body(request), take)
        if reading.end is None:
            raise EngineUnavailable(self.name, "the stream ended before the generation did")
        return reading.end

    def _take(self, reading: _Reading, sampling: SamplingParams, event: Event) -> bool:
        """Hand over what an event adds; whether the generation has ended."""
        reading.listener.heard = True
        if event.error is not None:
            refuse(self._http, "/v1/completions", event.error)
        for choice in event.choices[:1]:
            self._hand_over(choice, reading.listener.sink)
            reading.last = choice.token_ids[-1] if choice.token_ids else reading.last
            if choice.finish_reason is not None:
                self._note_end(choice, reading.last, sampling)
                reading.end = self._end(choice.finish_reason)
        return reading.end is not None

    def _hand_over(self, choice: Choice, sink: TokenSink) -> None:
        if choice.token_ids is None:
            self._has_token_ids = False  # another server than the one that was probed: it is looked at again
            if choice.text:
                raise self._http.wrong("/v1/completions", "got text without token ids")
        tokens = choice.token_ids or []
        logprobs = choice.logprobs.token_logprobs if choice.logprobs is not None else []
        values = [value for value in logprobs if value is not None]
        if len(values) != len(tokens):
            problem = f"got {len(tokens)} tokens but {len(values)} log-probabilities"
            raise self._http.wrong("/v1/completions", problem)
        if tokens or choice.text:
            sink(tokens, values, choice.text)

    def _note_end(self, choice: Choice, last: int | None, sampling: SamplingParams) -> None:
        """Learn that a token ends sequences: no path tells which do."""
        told = choice.stop_reason
        if told is None and self._dialect == "vllm":
            is_end = True
        elif told is None or told is msgspec.UNSET:
            is_end = not sampling.stop and not sampling.stop_token_ids
        else:
            is_end = told == last
        if choice.finish_reason == "stop" and is_end and last is not None and last not in sampling.stop_token_ids:
            self._end_ids.add(last)

    def _end(self, finish_reason: str) -> GenerationEnd:
        reason = REASONS.get(finish_reason)
        if reason is None:
            raise self._http.wrong("/v1/completions", f"unknown finish reason {finish_reason!r}")
        return GenerationEnd(reason, text_complete=reason != "abort")
