"""Closing gaps of llama.cpp streams: tokens that were left out because the text ended in incomplete UTF-8.

Drawing again from the gap on would be biased: the draw that fell on such a token would be replaced by one that may fall
on another. So the very same draw is repeated: the request, with its seed, once more without a stream, whose ``tokens``
are complete. What was streamed has to agree with it. Its log-probabilities leave the same tokens out; these are scored
one by one, each as the next token after its prefix.

Invariants:

* What is returned begins with the tokens that were handed over already.
* A log-probability is taken from the answer only where its token is certain; otherwise it is scored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import msgspec

from orchestrator.errors import EngineUnavailable

if TYPE_CHECKING:
    from .llamacpp import LlamaCppEngine

__all__ = ["Chunk", "Piece", "Probability", "fill_gap"]

FIRST_CANDIDATES: Final = 128
"""A sampled token is nearly always among this many of the likeliest; if not, all are asked for."""

ALL_CANDIDATES: Final = 1 << 20
"""More than any vocabulary; the server gives as many as there are."""

FORCE: Final = 1e4
"""Added to a logit, this makes its token certain. Raw log-probabilities do not see it."""


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
        return math.log(max(self.prob or 0.0, 1e-38))


class Chunk(msgspec.Struct):
    """What is used of an event of a stream, or of an answer without one."""

    content: str = ""
    tokens: list[int] = []
    tokens_predicted: int = 0
    completion_probabilities: list[Probability] = []
    stop: bool = False
    stop_type: str = ""
    error: dict[str, Any] | None = None


class Piece(msgspec.Struct):
    """A whole piece: all token ids, all log-probabilities, and how it ended."""

    tokens: list[int]
    logprobs: list[float]
    stop_type: str


async def fill_gap(engine: LlamaCppEngine, body: dict[str, Any], known: Sequence[int]) -> Piece:
    """Repeat a request whose stream had a gap after the tokens ``known``.

    Raises:
        EngineUnavailable: the repetition does not agree with what was streamed (arithmetic that depends on what else
            the server computes; about one in 10^5 tokens). The pool goes on from ``known`` with another seed.
    """
    answer = msgspec.convert(await engine.ask("/completion", body | {"stream": False}), Chunk)
    if answer.tokens[: len(known)] != list(known):
        raise EngineUnavailable(engine.name, "a repeated request gave other tokens than its stream")
    certain = _align(answer.tokens, [entry.id for entry in answer.completion_probabilities])
    logprobs: list[float] = []
    for position, token in enumerate(answer.tokens):
        if position in certain:
            logprobs.append(answer.completion_probabilities[certain[position]].value)
        elif position < len(known):
            logprobs.append(math.nan)  # handed over already, not used again
        else:
            context = [*body["prompt"], *answer.tokens[:position]]
            logprobs.append(await _score(engine, body, context, token))
    return Piece(answer.tokens, logprobs, answer.stop_type)


def _align(tokens: Sequence[int], entries: Sequence[int]) -> dict[int, int]:
    """Which position of ``tokens`` an entry is certainly of, the entries being a part of the tokens, in order.

    An entry's position is certain where taking the earliest and the latest possible one agree.
    """
    earliest, latest = [], []
    position = 0
    for entry in entries:
        position = tokens.index(entry, position)
        earliest.append(position)
        position += 1
    position = len(tokens) - 1
    for entry in reversed(entries):
        while tokens[position] != entry:
            position -= 1
        latest.append(position)
        position -= 1
    latest.reverse()
    return {first: i for i, (first, last) in enumerate(zip(earliest, latest, strict=True)) if first == last}


async def _score(engine: LlamaCppEngine, body: dict[str, Any], context: list[int], token: int) -> float:
    """The log-probability of one token after a context, at the temperature of the request."""
    temperature = body["temperature"] if body["post_sampling_probs"] else 1.0
    sizes = (FIRST_CANDIDATES, ALL_CANDIDATES) if temperature == 1 else (ALL_CANDIDATES,)
    for size in sizes:
        logprobs = await _next_token(engine, body, context, size)
        if token in logprobs:
            if temperature == 1:
                return logprobs[token]
            scaled = [value / temperature for value in logprobs.values()]
            top = max(scaled)
            total = top + math.log(math.fsum(math.exp(value - top) for value in scaled))
            return logprobs[token] / temperature - total
    raise EngineUnavailable(engine.name, f"it gives no log-probability of token {token}")


async def _next_token(engine: LlamaCppEngine, body: dict[str, Any], context: list[int], size: int) -> dict[int, float]:
    """Raw log-probabilities of the ``size`` likeliest next tokens.

    The token that is drawn is forced to be a plain letter, because the answer would leave out an incomplete one.
    """
    letter = (await engine.tokenize("a"))[-1]
    question = body | {
        "prompt": context,
        "n_predict": 1,
        "n_probs": size,
        "stream": False,
        "post_sampling_probs": False,
        "logit_bias": [[letter, FORCE]],
        "stop": [],
    }
    answer = msgspec.convert(await engine.ask("/completion", question), Chunk)
    if not answer.completion_probabilities:
        raise EngineUnavailable(engine.name, "it gives no log-probabilities")
    entry = answer.completion_probabilities[0]
    return {candidate.id: candidate.value for candidate in [*entry.top_logprobs, entry]}
