"""Writes the prompt files beside it, the same ones at every call: sums as text, digits to repeat as token ids."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROWS = 300

BEGIN, DOT, EQUALS = 14, 10, 11
"""Token ids of `examples/curriculum_learning/tiny_llama.py`; a digit is its own id."""

WIDTH = 4
"""Digits are padded to this width, so that the answer begins at the same place in every prompt."""


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """One line of JSON a row."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def sums(*, smallest: int, largest: int, seed: int) -> Iterable[dict[str, Any]]:
    """``ROWS`` rows of ``{"prompt": "7+5=", "label": "12"}``."""
    draw = random.Random(seed)  # noqa: S311 - sums, not secrets
    for _ in range(ROWS):
        a, b = draw.randint(smallest, largest), draw.randint(smallest, largest)
        yield {"prompt": f"{a}+{b}=", "label": str(a + b)}


def digits(numbers: Iterable[int]) -> Iterable[dict[str, Any]]:
    """Each number to be repeated: ``12`` is asked for as ``<|begin|>12..=``, and has 2 tokens to answer with."""
    for number in numbers:
        text = str(number)
        tokens = [BEGIN, *map(int, text), *[DOT] * (WIDTH - len(text)), EQUALS]
        yield {"prompt": tokens, "label": text, "max_new_tokens": len(text)}


if __name__ == "__main__":
    here = Path(__file__).parent
    write(here / "easy_sums.jsonl", sums(smallest=0, largest=9, seed=1))
    write(here / "hard_sums.jsonl", sums(smallest=100, largest=999, seed=2))
    draw = random.Random(3)  # noqa: S311 - digits, not secrets
    write(here / "easy_digits.jsonl", digits([*range(10)] * 9 + [*range(10, 100)]))
    write(
        here / "hard_digits.jsonl", digits(draw.sample(range(100, 1000), ROWS) + draw.sample(range(1000, 10000), ROWS))
    )
