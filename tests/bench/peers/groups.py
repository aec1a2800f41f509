"""What the peers' producers begin with: the columns of a group as an engine's answer gives them, in Python's lists."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable
from typing import Any

import numpy as np

NAMES = ("tokens", "logprobs", "loss_mask", "text")
Columns = list[tuple[list[int], list[float], str]]


def columns(tokens: int, samples: int, text_bytes: int) -> Columns:
    """Tokens, log-probabilities and text of each sample."""
    text = "the sum of two numbers is " * (1 + text_bytes // 26)
    return [
        ([(7919 * i + 31 * j) % 100_000 for j in range(tokens)], [-0.001 * j for j in range(tokens)], text[:text_bytes])
        for i in range(samples)
    ]


def as_bytes(group: Columns) -> list[tuple[bytes, bytes, bytes, bytes]]:
    """Tokens as int32, log-probabilities as float32, loss mask, text."""
    return [
        (array("i", tokens).tobytes(), array("f", logprobs).tobytes(), b"\x01" * len(tokens), text.encode())
        for tokens, logprobs, text in group
    ]


def as_arrays(group: Columns) -> list[dict[str, Any]]:
    """The same by column, as arrays over those bytes."""
    dtypes = ("i4", "f4", "u1", "u1")
    return [
        {name: np.frombuffer(data, dtype) for name, data, dtype in zip(NAMES, sample, dtypes, strict=True)}
        for sample in as_bytes(group)
    ]


def serve(turn: Callable[[int], None]) -> None:
    """Do a turn for each number that comes in a line, and say when it is done."""
    print("ready", flush=True)
    for line in sys.stdin:
        turn(int(line))
        print("done", flush=True)
