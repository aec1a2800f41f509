"""Writes the prompt files beside it: sums of one-digit and of three-digit numbers, the same ones at every call."""

from __future__ import annotations

import json
import random
from pathlib import Path

ROWS = 300


def write_sums(path: Path, *, smallest: int, largest: int, seed: int) -> None:
    """Write ``ROWS`` rows of ``{"prompt": "7+5=", "label": "12"}``."""
    draw = random.Random(seed)  # noqa: S311 - sums, not secrets
    with path.open("w", encoding="utf-8") as file:
        for _ in range(ROWS):
            a, b = draw.randint(smallest, largest), draw.randint(smallest, largest)
            file.write(json.dumps({"prompt": f"{a}+{b}=", "label": str(a + b)}) + "\n")


if __name__ == "__main__":
    here = Path(__file__).parent
    write_sums(here / "easy_sums.jsonl", smallest=0, largest=9, seed=1)
    write_sums(here / "hard_sums.jsonl", smallest=100, largest=999, seed=2)
