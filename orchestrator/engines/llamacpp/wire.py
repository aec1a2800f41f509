"""What is used of the answers of a llama.cpp server, and its ``/completion``.

Invariants:

* Token ids are checked where they come in: they fit into the 4 bytes that samples hold them in.
* Every log-probability is finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import msgspec

from orchestrator.engines.http.client import REQUEST_DEADLINE_S, EngineHttp, TokenId

__all__ = ["Chunk", "Content", "Probability", "Prompt", "Props", "Tokens", "complete", "streamed"]

LOWEST_PROBABILITY: Final = 1e-38
"""A sampled token whose probability was rounded to 0 gets a finite log-probability."""


class Props(msgspec.Struct):
    """``/props``; ``n_ctx`` of the settings bounds prompt and response together."""

    default_generation_settings: dict[str, Any]
    model_alias: str | None = None
    model_path: str | None = None
    eos_token: str | None = None


class Tokens(msgspec.Struct):
    """``/tokenize``."""

    tokens: list[TokenId]


class Content(msgspec.Struct):
    """``/detokenize``."""

    content: str


class Prompt(msgspec.Struct):
    """``/apply-template``."""

    prompt: str


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


async def complete(http: EngineHttp, body: dict[str, Any], *, deadline_s: float = REQUEST_DEADLINE_S) -> Chunk:
    """``/completion`` without a stream; raises as :meth:`EngineHttp.ask` does."""
    return await http.ask("/completion", Chunk, body | {"stream": False}, deadline_s=deadline_s)


async def streamed(http: EngineHttp, body: dict[str, Any], on_chunk: Callable[[Chunk], bool]) -> None:
    """Hand over the events of ``/completion``; as :meth:`EngineHttp.stream`, also where an event is an error."""

    def take(chunk: Chunk) -> bool:
        if chunk.error is not None:
            http.refuse(chunk.error.code, f"/completion: {chunk.error.message}")
        return on_chunk(chunk)

    await http.stream("/completion", Chunk, body | {"stream": True}, take)
