"""The scripted engine: invented responses at a chosen speed and with chosen faults, for tests and capacity planning.

What it gives is a function of the seed and of what it is asked, never of time:

* Its vocabulary is the 256 bytes, and 256 as the end-of-sequence token; text is UTF-8.
* The response to a prompt is a function of (``seed``, prompt, ``sample_index``): lower-case words, or with probability
  ``echo_rate`` the prompt's last word turned into an answer (see :func:`answer_of`). Token ``t`` of it does not depend
  on how the response was cut into pieces, so an interrupted and continued response is the uninterrupted one;
  :meth:`ScriptedEngine.expected_response` says what it is.
* Stop texts and stop tokens end it where they first occur in the whole response.
* Faults are drawn from (``seed``, sample, attempt): a request that is tried again draws anew.

Invariants:

* Times are multiplied by ``time_scale``; with 0 nothing waits, and only the order of events is left.
* Tokens are handed over in chunks of ``chunk``, each under its own wait.
"""

from __future__ import annotations

import hashlib
import math
import random
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

import anyio
from anyio.abc import TaskStatus

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

__all__ = ["ScriptedEngine", "answer_of"]

END_OF_SEQUENCE: Final = 256
CONTEXT_TOKENS: Final = 1 << 20
WORDS: Final = (
    "add",
    "and",
    "be",
    "first",
    "for",
    "get",
    "is",
    "let",
    "sum",
    "so",
    "the",
    "then",
    "to",
    "two",
    "we",
    "x",
)


def answer_of(prompt: str) -> str:
    """What an echoing response says: the sum of a prompt such as ``12+30=``, else its last word without ``=?:``."""
    words = prompt.split()
    last = words[-1].rstrip("=?:") if words else ""
    terms = last.split("+")
    if len(terms) > 1 and all(term.isdecimal() and len(term) < 19 for term in terms):
        return str(sum(map(int, terms)))
    return last


def _first_stop(tokens: Sequence[int], sampling: SamplingParams) -> int | None:
    """How many tokens there are up to the first end: of the sequence, by a stop token, by a stop text."""
    ends = [tokens.index(end) + 1 for end in (END_OF_SEQUENCE, *sampling.stop_token_ids) if end in tokens]
    stops = list(filter(None, sampling.stop))
    text = bytes([token % END_OF_SEQUENCE for token in tokens]) if stops else b""  # as long; the end shows as 0
    for stop in stops:
        at = text.find(stop.encode())
        if at >= 0:
            ends.append(at + len(stop.encode()))
    return min(ends, default=None)


class ScriptedEngine:
    """See the module's docstring.

    Args:
        name: unique among the engines.
        max_in_flight: requests at a time.
        seed: of responses and faults.
        tokens_per_s: of one request.
        first_token_s: until the first token.
        length: shortest and longest response in tokens, evenly drawn; ``None``: always ``max_new_tokens``.
        tail_sigma: with it lengths are long-tailed instead: lognormal, with the middle of ``length`` (or half of
            ``max_new_tokens``) as median.
        failure_rate: share of requests that are answered as by a 503.
        reset_rate: share of requests whose connection breaks half way.
        hang_rate: share of requests that stop half way and never end.
        reject_rate: share of requests that are refused as by a 400.
        delay_s: before every answer.
        time_scale: factor on all times.
        echo_rate: share of responses that are the answer to the prompt.
        chunk: tokens handed over at a time.
        context_tokens: of prompt and response together; a longer prompt is refused, a longer response cut.
        update_s: to load other parameters, which change nothing of what it says.
        update_faults: policy versions that it does not load: it refuses, breaks half way, or hangs.
    """

    def __init__(
        self,
        *,
        name: str,
        max_in_flight: int = 64,
        seed: int = 0,
        tokens_per_s: float = 100.0,
        first_token_s: float = 0.02,
        length: tuple[int, int] | None = None,
        tail_sigma: float | None = None,
        failure_rate: float = 0.0,
        reset_rate: float = 0.0,
        hang_rate: float = 0.0,
        reject_rate: float = 0.0,
        delay_s: float = 0.0,
        time_scale: float = 1.0,
        echo_rate: float = 0.0,
        chunk: int = 16,
        context_tokens: int = CONTEXT_TOKENS,
        update_s: float = 0.0,
        update_faults: Mapping[int, Literal["refuse", "break", "hang"]] | None = None,
    ) -> None:
        self.name = name
        self.max_in_flight = max_in_flight
        self._seed = seed
        self._tokens_per_s = tokens_per_s
        self._first_token_s = first_token_s
        self._length = length
        self._tail_sigma = tail_sigma
        self._faults = (failure_rate, reset_rate, hang_rate, reject_rate)
        self._delay_s = delay_s
        self._time_scale = time_scale
        self._echo_rate = echo_rate
        self._chunk = chunk
        self._context_tokens = context_tokens
        self._update_s = update_s
        self._update_faults = update_faults or {}
        self._policy_version: int | None = None
        self._loading = anyio.Lock()

    # -- what it would say ---------------------------------------------------------------------------------------------

    def _draw(self, *key: object) -> random.Random:
        text = "/".join(map(str, (self._seed, *key)))
        return random.Random(hashlib.blake2b(text.encode(), digest_size=8).digest())  # noqa: S311 - made up on purpose

    def expected_response(
        self, prompt_tokens: Sequence[int], sampling: SamplingParams, sample_index: int
    ) -> tuple[list[int], list[float]]:
        """Token ids and log-probabilities of the whole response, however it is cut into pieces."""
        tokens, logprobs, _ = self._response(prompt_tokens, sampling, sample_index)
        return tokens, logprobs

    def _response(
        self, prompt_tokens: Sequence[int], sampling: SamplingParams, sample_index: int
    ) -> tuple[list[int], list[float], FinishReason]:
        draw = self._draw("response", hashlib.blake2b(array("i", prompt_tokens).tobytes()).hexdigest(), sample_index)
        if draw.random() < self._echo_rate:
            tokens = [*answer_of(self._decode(prompt_tokens)).encode(), END_OF_SEQUENCE]
        else:
            length = self._draw_length(draw, sampling.max_new_tokens)
            text = bytearray()
            while len(text) < length:
                text += draw.choice(WORDS).encode() + b" "
            tokens = list(text[:length])
            if length < sampling.max_new_tokens:
                tokens[-1] = END_OF_SEQUENCE
        end = _first_stop(tokens, sampling)
        room = max(0, min(sampling.max_new_tokens, self._context_tokens - len(prompt_tokens)))
        logprobs = [-draw.random() * 3 for _ in tokens]
        tokens = tokens[: min(end or room, room)]
        return tokens, logprobs[: len(tokens)], "stop" if len(tokens) == end else "length"

    def _draw_length(self, draw: random.Random, longest: int) -> int:
        low, high = self._length or (longest, longest)
        if self._tail_sigma is not None:
            median = (low + high) / 2 if self._length else longest / 2
            return max(1, min(longest, round(draw.lognormvariate(math.log(median), self._tail_sigma))))
        return max(1, min(longest, draw.randint(low, high)))

    @staticmethod
    def _decode(tokens: Sequence[int]) -> str:
        return bytes([token for token in tokens if token < END_OF_SEQUENCE]).decode("utf-8", "replace")

    # -- the port ------------------------------------------------------------------------------------------------------

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """Nothing to own."""
        task_status.started()

    async def probe(self) -> EngineInfo:
        """Always well."""
        return EngineInfo(
            model="scripted",
            context_tokens=self._context_tokens,
            policy_version=self._policy_version,
            instance="scripted",
            end_ids=(END_OF_SEQUENCE,),
        )

    async def tokenize(self, text: str) -> list[int]:
        """The bytes of the text."""
        return list(text.encode("utf-8", "replace"))

    async def tokenize_chat(self, messages: Sequence[Message], template_kwargs: dict[str, Any]) -> list[int]:
        """The bytes of ``role: content`` lines, ending with the assistant's turn."""
        lines = [f"{message.get('role', 'user')}: {message.get('content', '')}\n" for message in messages]
        return await self.tokenize("".join(lines) + "assistant: ")

    async def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of the bytes."""
        return self._decode(tokens)

    async def generate(self, request: GenerationRequest, sink: TokenSink) -> GenerationEnd:
        """Hand over the next tokens of the response, in chunks; see the port."""
        fault, after = self._fault(request)
        await self._wait(self._delay_s)
        if fault == "reject":
            raise EngineRejected(self.name, "the script refuses this request")
        if fault == "failure":
            raise EngineUnavailable(self.name, "the script answers 503")
        self._check(request.tokens)
        begin = len(request.tokens) - request.generated
        tokens, logprobs, reason = self._response(request.tokens[:begin], request.sampling, request.sample_index)
        at, end = request.generated, min(len(tokens), request.generated + request.max_new_tokens)
        await self._wait(self._first_token_s)
        while at < end:
            upto = min(end, at + self._chunk)
            await self._wait((upto - at) / self._tokens_per_s)
            if self._loading.locked():
                async with self._loading:
                    pass
            if fault is not None and upto - request.generated > after:
                await self._break(fault)
            sink(tokens[at:upto], logprobs[at:upto], self._decode(tokens[at:upto]))
            at = upto
        if fault is not None:
            await self._break(fault)
        # A character may lie across two chunks, and the text of a stop does not belong to the response.
        is_ascii = max(set(tokens) - {END_OF_SEQUENCE}, default=0) < 128
        return GenerationEnd(
            "length" if at < len(tokens) else reason, text_complete=is_ascii and not request.sampling.stop
        )

    def _check(self, tokens: Sequence[int]) -> None:
        if len(tokens) >= self._context_tokens:
            raise EngineRejected(
                self.name, f"{len(tokens)} tokens do not fit into the context of {self._context_tokens}"
            )
        if not tokens or min(tokens) < 0 or max(tokens) > END_OF_SEQUENCE:
            raise EngineRejected(self.name, f"a prompt must be one or more token ids from 0 to {END_OF_SEQUENCE}")

    def _fault(self, request: GenerationRequest) -> tuple[str | None, int]:
        """The fault of this request, if any, and after how many tokens it strikes."""
        draw = self._draw("fault", request.sample_index, request.attempt)
        at = draw.random()
        for name, rate in zip(("failure", "reset", "hang", "reject"), self._faults, strict=True):
            if at < rate:
                return name, draw.randrange(request.max_new_tokens)
            at -= rate
        return None, 0

    async def _break(self, fault: str) -> None:
        if fault == "hang":
            await anyio.sleep_forever()
        raise EngineUnavailable(self.name, "the script breaks the connection")

    async def _wait(self, seconds: float) -> None:
        await anyio.sleep(seconds * self._time_scale)

    # -- parameters ----------------------------------------------------------------------------------------------------

    async def update_parameters(self, update: ParameterUpdate) -> None:
        """Take the version after ``update_s``; what is under way waits, as at a server that is paused."""
        async with self._loading:
            await self._wait(self._update_s)
            match self._update_faults.get(update.version):
                case "refuse":
                    raise EngineRejected(self.name, f"the script refuses version {update.version}")
                case "break":
                    raise EngineUnavailable(self.name, f"the script breaks while it loads version {update.version}")
                case "hang":
                    await anyio.sleep_forever()
            self._policy_version = update.version

    async def aclose(self) -> None:
        """Nothing to close."""
