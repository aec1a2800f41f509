"""What the peers' producers begin with, Python's lists as an engine's answer gives them, and how these become columns.

A group's columns hold its samples one after the other, as the daemon's do, so that nobody is held against more pieces
than it would have to send.
"""

from __future__ import annotations

import random
import struct
import sys
from collections.abc import Callable

import numpy as np

DTYPES = {"tokens": "i4", "logprobs": "f4", "loss_mask": "u1", "text": "u1", "lengths": "i4"}
NAMES = tuple(DTYPES)
Columns = list[tuple[list[int], list[float], str]]


def columns(tokens: int, samples: int, text_bytes: int) -> Columns:
    """Tokens, log-probabilities and text of each sample; drawn at random: some peers compress."""
    draw, text = random.Random(0), "the sum of two numbers is " * (1 + text_bytes // 26)
    return [
        (
            [draw.randrange(100_000) for _ in range(tokens)],
            [-3 * draw.random() for _ in range(tokens)],
            text[:text_bytes],
        )
        for _ in range(samples)
    ]


def as_bytes(group: Columns) -> dict[str, bytes]:
    """By column; ``struct`` is the quickest way there is from lists, and the daemon's too."""
    return {
        "tokens": b"".join([struct.pack(f"{len(tokens)}i", *tokens) for tokens, _, _ in group]),
        "logprobs": b"".join([struct.pack(f"{len(logprobs)}f", *logprobs) for _, logprobs, _ in group]),
        "loss_mask": b"".join([b"\x01" * len(tokens) for tokens, _, _ in group]),
        "text": b"".join([text.encode() for _, _, text in group]),
        "lengths": struct.pack(f"{len(group)}i", *[len(tokens) for tokens, _, _ in group]),
    }


def as_arrays(group: Columns) -> dict[str, np.ndarray]:
    """The same as arrays over those bytes."""
    return {name: np.frombuffer(data, DTYPES[name]) for name, data in as_bytes(group).items()}


def looked_at(array: np.ndarray) -> int:
    """How many there are, once every byte has been read, so that nothing is won by putting work off."""
    data = array.view(np.uint8)
    np.bitwise_xor.reduce(data[: len(data) & ~7].view(np.uint64))
    return len(array)


def check(found: dict[str, np.ndarray], tokens: int, samples: int) -> None:
    """Look at all of a group."""
    lengths = {name: looked_at(found[name]) for name in NAMES}
    assert lengths["tokens"] == lengths["logprobs"] == lengths["loss_mask"] == tokens * samples
    assert lengths["lengths"] == samples


def serve(turn: Callable[[int], None]) -> None:
    """Do a turn for each number that comes in a line, and say when it is done."""
    print("ready", flush=True)
    for line in sys.stdin:
        turn(int(line))
        print("done", flush=True)
