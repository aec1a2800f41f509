"""What the fake servers of campaigns say: a function of what they are asked, as a language model's.

Each token is drawn from a hash of everything before it. A prompt ends with ``=``. The first ``IDENTITY`` tokens of a
response are drawn by the request's seed and tell the responses to one prompt apart. So a test can check every token and
log-probability of a response by itself (:func:`problem_of`).
"""

from __future__ import annotations

import random
import zlib
from array import array
from collections.abc import Sequence
from typing import Final

from tests.support.fake_server import END_OF_SEQUENCE

LETTERS: Final = b"abcdefghijklmnop"
PROMPT_END: Final = ord("=")
IDENTITY: Final = 8
"""Tokens that tell responses to one prompt apart: 32 bits."""

LONGEST: Final = 1 << 15


def _mix(state: int) -> int:
    return (state * 0x9E3779B1 + 0x7F4A7C15) & 0xFFFFFFFF


def _hash(tokens: Sequence[int], state: int = 0) -> int:
    return zlib.crc32(array("h", tokens).tobytes(), state)


def _logprob(state: int, token: int) -> float:
    return -((_mix(_hash((token, 1), state)) >> 8) % 3000) / 1000


def prompt_length(tokens: Sequence[int]) -> int:
    """How many of the tokens are the prompt."""
    return list(tokens).index(PROMPT_END) + 1


def continued(
    tokens: Sequence[int], *, seed: int | None, length: tuple[int, int], n: int
) -> tuple[list[int], list[float], bool]:
    """The next ``n`` tokens, their log-probabilities, and whether the response ends with them.

    ``seed`` is for the first tokens of a response; ``None``: greedy.
    """
    begin = prompt_length(tokens)
    draw = random.Random(seed)
    said = list(tokens[begin:])
    state = _hash(tokens[:begin])
    length_drawn = LONGEST
    found: list[int] = []
    logprobs: list[float] = []
    at = 0
    while len(found) < n and at < length_drawn:
        if at == IDENTITY:
            length_drawn = IDENTITY + 1 + _mix(state ^ 0x5BD1E995) % (length[1] - length[0] + 1) + length[0]
        if at < len(said):
            token = said[at]
        else:
            if at < IDENTITY and seed is not None:
                token = draw.choice(LETTERS)
            elif at == length_drawn - 1:
                token = END_OF_SEQUENCE
            else:
                token = LETTERS[_mix(state) >> 28]
            found.append(token)
            logprobs.append(_logprob(state, token))
        state = _hash((token,), state)
        at += 1
    return found, logprobs, at >= length_drawn


def problem_of(
    prompt: Sequence[int], response: Sequence[int], logprobs: Sequence[float], *, length: tuple[int, int], limit: int
) -> str | None:
    """What is wrong with a whole response of at most ``limit`` tokens; ``None``: nothing, to the last token."""
    first = list(response[:IDENTITY])
    rest, rest_logprobs, _ = continued([*prompt, *first], seed=None, length=length, n=limit - len(first))
    expected = [*first, *rest]
    if list(response) != expected:
        at = next((i for i, pair in enumerate(zip(response, expected, strict=False)) if pair[0] != pair[1]), -1)
        return f"{len(response)} tokens, {len(expected)} expected; they differ from token {at} on"
    if not set(first) <= set(LETTERS):
        return f"it begins with {first}"
    state, first_logprobs = _hash(prompt), []
    for token in first:
        first_logprobs.append(_logprob(state, token))
        state = _hash((token,), state)
    for i, (given, wanted) in enumerate(zip(logprobs, [*first_logprobs, *rest_logprobs], strict=True)):
        if abs(given - wanted) > 1e-5:
            return f"token {i} has the log-probability {given}, {wanted} expected"
    return None
