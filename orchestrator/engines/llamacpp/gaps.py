"""Closing gaps of llama.cpp streams: tokens that were left out because the text ended in incomplete UTF-8.

Drawing again from the gap on would be biased: the draw that fell on such a token would be replaced by one that may fall
on another. So the very same draw is repeated: the request, with its seed, once more without a stream, whose ``tokens``
are complete, up to the event that showed the gap and no further. All that was streamed has to agree with it. Its
log-probabilities leave the same tokens out; these are scored one by one, each as the next token after its prefix.

What the repetition cannot tell is whether arithmetic that depends on what else the server computes led it elsewhere
*inside* the gap and back to the same token after it. What it then gives is still a draw from the model; and where it
disagrees visibly (about one token in 10^5 on a loaded server) the gap is drawn anew. Both are far below sampling noise.

Invariants:

* What is returned are the tokens between those that were streamed before the gap and those of the event after it.
* A log-probability is never guessed: it comes from the stream or from a scoring.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, NamedTuple

import anyio

from orchestrator.engines.http.client import EngineHttp
from orchestrator.engines.port import TokenSink
from orchestrator.errors import EngineError, EngineUnavailable

from .wire import Chunk, Tokens, complete

__all__ = ["Missing", "missing_tokens", "score", "signs_of_life"]

FIRST_CANDIDATES: Final = 128
"""A sampled token is nearly always among this many of the likeliest; if not, all are asked for."""

ALL_CANDIDATES: Final = 1 << 20
"""More than any vocabulary; the server gives as many as there are."""

SIGN_OF_LIFE_INTERVAL_S: Final = 1.0
"""While a gap is closed nothing can be handed over; the pool is told that this is no stall."""

FORCE: Final = 1e4
"""Added to a logit, this makes its token certain. Raw log-probabilities do not see it."""


class Missing(NamedTuple):
    """Token ids that a stream left out, and how the server says that generation ended with the event after them."""

    tokens: list[int]
    stop_type: str


async def missing_tokens(
    http: EngineHttp, body: dict[str, Any], known: Sequence[int], after: Chunk, *, deadline_s: float
) -> Missing:
    """What a stream left out.

    Args:
        http: the server.
        body: of the request that was streamed.
        known: token ids that were streamed before the gap.
        after: the event that showed the gap.
        deadline_s: for the repetition.

    Raises:
        EngineUnavailable: the repetition does not agree with what was streamed. The pool goes on from ``known`` with
            another seed.
    """
    answer = await complete(http, body | {"n_predict": after.tokens_predicted}, deadline_s=deadline_s)
    end = after.tokens_predicted - len(after.tokens)
    agrees = (
        len(answer.tokens) == after.tokens_predicted
        and answer.tokens[: len(known)] == list(known)
        and answer.tokens[end:] == after.tokens
    )
    if not agrees:
        raise EngineUnavailable(http.name, "a repeated request gave different tokens than its stream")
    return Missing(answer.tokens[len(known) : end], answer.stop_type)


async def score(http: EngineHttp, body: dict[str, Any], context: Sequence[int], tokens: Sequence[int]) -> list[float]:
    """Log-probabilities of ``tokens`` after ``context``, of the distribution that the request asks for.

    Raises:
        EngineUnavailable: the server does not give one.
    """
    # The token that is drawn is forced to be a plain letter, because the answer would leave out an incomplete one.
    letters = (await http.ask("/tokenize", Tokens, {"content": "a", "add_special": False})).tokens
    if not letters:
        raise EngineUnavailable(http.name, "its tokenizer has no token for the letter a")
    question = body | {
        "n_predict": 1,
        "post_sampling_probs": False,
        "logit_bias": [[letters[-1], FORCE]],
        "stop": [],
    }
    temperature = body["temperature"] if body["post_sampling_probs"] else 1.0
    scores: list[float] = []
    for position, token in enumerate(tokens):
        prompt = {"prompt": [*context, *tokens[:position]]}
        scores.append(await _score_one(http, question | prompt, token, temperature))
    return scores


async def _score_one(http: EngineHttp, question: dict[str, Any], token: int, temperature: float) -> float:
    sizes = (FIRST_CANDIDATES, ALL_CANDIDATES) if temperature == 1 else (ALL_CANDIDATES,)
    for size in sizes:
        answer = await complete(http, question | {"n_probs": size})
        if not answer.completion_probabilities:
            break
        entry = answer.completion_probabilities[0]
        logprobs = {candidate.id: candidate.value for candidate in [*entry.top_logprobs, entry]}
        if token in logprobs:
            return logprobs[token] if temperature == 1 else _at_temperature(logprobs, token, temperature)
    raise EngineUnavailable(http.name, f"it gives no log-probability for token {token}")


def _at_temperature(logprobs: dict[int, float], token: int, temperature: float) -> float:
    """The log-softmax of ``logprobs / temperature`` at ``token``; ``logprobs`` are of the whole vocabulary."""
    scaled = [value / temperature for value in logprobs.values()]
    top = max(scaled)
    return logprobs[token] / temperature - top - math.log(math.fsum(math.exp(value - top) for value in scaled))


@asynccontextmanager
async def signs_of_life(sink: TokenSink) -> AsyncIterator[None]:
    """Tell the pool that this is no stall; everything within has deadlines of its own."""

    async def show() -> None:
        while True:
            sink((), (), "")
            await anyio.sleep(SIGN_OF_LIFE_INTERVAL_S)

    failure: EngineError | None = None
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(show)
        try:
            yield
        except EngineError as error:  # not to be wrapped into a group
            failure = error
        tasks.cancel_scope.cancel()
    if failure is not None:
        raise failure
