"""The port of inference engines: what the rest of the daemon knows of them, whatever protocol they speak.

Invariants:

* Token ids in, token ids and log-probabilities out. Text is a convenience that travels beside the tokens.
* What an adapter hands to the sink is final: it is kept whatever happens afterwards, cancellation included.
  An adapter never takes tokens back and never hands over a token twice.
* Adapters do not retry. The pool (``pool.py``) owns retries, deadlines and the choice of an engine.
* Every failure is one of the ``EngineError`` types: unavailable and stalled are worth another try, rejected is not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from anyio.abc import TaskStatus

from orchestrator.records import Message

__all__ = [
    "Engine",
    "EngineInfo",
    "FinishReason",
    "GenerationEnd",
    "GenerationRequest",
    "ParameterUpdate",
    "SamplingParams",
    "TokenSink",
]

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn; neutral defaults, so that nothing truncates the distribution unasked.

    ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 switch the respective truncation off. ``seed`` makes a run's draws
    repeatable as far as the engine allows: each sample and each continuation derives its own from it.
    """

    max_new_tokens: int = 1024
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One piece of one response.

    ``tokens`` are the prompt and what was generated before, the last ``generated`` of them; ``max_new_tokens`` counts
    this piece only and stands in for that of ``sampling``; ``seed`` is this piece's own (``sampling.seed`` is not
    looked at). ``sample_index`` is the same for all pieces of a sample, ``attempt`` counts the requests for it, from 0.

    ``messages`` is set only towards engines that are ``text_only``, with empty ``tokens``: the chat that asks for the
    response, a prompt that is a text being one message of the user.
    """

    request_id: str
    tokens: Sequence[int]
    max_new_tokens: int
    sampling: SamplingParams
    seed: int | None = None
    generated: int = 0
    sample_index: int = 0
    attempt: int = 0
    messages: Sequence[Message] | None = None


@dataclass(frozen=True, slots=True)
class ParameterUpdate:
    """Parameters to load: ``path`` is a file or directory as the engine's own machine sees it.

    With ``keeps_requests`` what is in flight stays where it is and goes on with the new parameters; otherwise the
    caller has seen to it that nothing of ours is in flight at this engine.
    """

    path: str
    version: int
    keeps_requests: bool = False


@dataclass(frozen=True, slots=True)
class GenerationEnd:
    """How a piece ended: ``stop`` (end-of-sequence or stop text), ``length`` (``max_new_tokens``), ``abort``.

    ``text_complete`` says whether the text handed to the sink is the text of all tokens handed to the sink; if not,
    the pool asks the engine to detokenise.
    """

    reason: FinishReason
    text_complete: bool = True


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine says of itself.

    ``policy_version`` and ``instance`` (something that changes when the server is restarted) are ``None`` where the
    engine cannot tell. ``logprobs`` is the distribution that log-probabilities are of at temperatures other than 1:
    ``temperature`` (after temperature, before truncation) or ``raw``. ``context_tokens`` bounds prompt + response.
    ``end_ids``: tokens that end a sequence, as far as the engine tells; a response that ends with one is not continued.
    ``text_only``: it takes messages and gives text, no token ids and no log-probabilities; what is interrupted begins
    anew.
    """

    model: str
    context_tokens: int | None = None
    policy_version: int | None = None
    instance: str | None = None
    logprobs: Literal["temperature", "raw"] = "temperature"
    text_only: bool = False
    end_ids: tuple[int, ...] = ()


TokenSink = Callable[[Sequence[int], Sequence[float] | None, str], None]
"""Called with ``(tokens, logprobs, text)`` as they arrive; never blocks. ``logprobs`` is ``None`` where the engine
cannot give them, else as long as ``tokens``; ``text`` may be empty. A call without tokens and text says that the engine
is at work, where an adapter knows that from elsewhere: it counts against a stall."""


class Engine(Protocol):
    """One inference server."""

    @property
    def name(self) -> str:
        """Unique among the engines of a run; appears in logs, status and errors."""
        ...

    @property
    def max_in_flight(self) -> int:
        """How many requests the pool may have at this engine at once."""
        ...

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """Own whatever must live while the engine is used (a child process); call ``started()`` when usable.

        An adapter of a remote server calls ``started()`` at once and returns.
        """
        ...

    async def probe(self) -> EngineInfo:
        """Health check.

        Raises:
            EngineUnavailable: the engine cannot be used now.
        """
        ...

    async def tokenize(self, text: str) -> list[int]:
        """Token ids of a text prompt, with the special tokens that the model begins a text with."""
        ...

    async def tokenize_chat(self, messages: Sequence[Message], template_kwargs: dict[str, Any]) -> list[int]:
        """Token ids of chat messages after the model's own template, ready for the assistant's turn."""
        ...

    async def detokenize(self, tokens: Sequence[int]) -> str:
        """Text of the token ids, without control tokens; bytes that are not UTF-8 become U+FFFD."""
        ...

    async def generate(self, request: GenerationRequest, sink: TokenSink) -> GenerationEnd:
        """Run one piece, handing tokens to ``sink`` as they arrive. Cancellation frees the engine's slot.

        Raises:
            EngineUnavailable, EngineStalled, EngineRejected: see ``orchestrator.errors``.
        """
        ...

    async def update_parameters(self, update: ParameterUpdate) -> None:
        """Load other parameters and forget what was cached of the old ones; afterwards the engine answers with the new.

        The server is paused for as long as it takes, where it can be, and goes on whether that succeeded or not: with
        the old parameters if it did not. The caller sets a deadline.

        Raises:
            EngineRejected: the engine cannot do that, or refused the path; the message says what to do instead.
            EngineUnavailable, EngineStalled: it is not known which parameters the engine holds now.
        """
        ...

    async def aclose(self) -> None:
        """Close connections; ends what is in flight."""
        ...
