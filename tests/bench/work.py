"""The work: groups as an engine would leave them. A batch is of 32 groups, a group of 8 samples."""

from __future__ import annotations

import operator
import random
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from orchestrator.core.mixture.plan import PlannedBatch
from orchestrator.frames import encode_group
from orchestrator.records import Group, Prompt, Sample, SampleStatus

GROUPS_A_BATCH: Final = 32
SAMPLES: Final = 8
PROMPT_TOKENS: Final = 256


@dataclass(frozen=True)
class Shape:
    """Of a group: response tokens of a sample, and bytes of its text."""

    name: str
    tokens: int
    text_bytes: int

    @property
    def group_bytes(self) -> int:
        return SAMPLES * (9 * self.tokens + self.text_bytes) + 4 * PROMPT_TOKENS


SMALL: Final = Shape("small", 64, 0)
STANDARD: Final = Shape("standard", 1024, 4096)
LONG: Final = Shape("long", 16384, 4096)
SHAPES: Final = (SMALL, STANDARD, LONG)


def demand(plan: Sequence[PlannedBatch]) -> dict[str, int]:
    """Groups of each source that a plan needs in all; empty for an empty plan."""
    if not plan:
        return {}
    totals = list(plan[0].counts.values())
    for batch in plan[1:]:  # every batch names all sources in one order
        totals = list(map(operator.add, totals, batch.counts.values()))
    return dict(zip(plan[0].counts, totals, strict=True))


class Maker:
    """Makes samples and groups of one shape; numbers are drawn once and shifted, so that making them costs little."""

    def __init__(self, shape: Shape, seed: int = 0) -> None:
        draw = random.Random(seed)
        self.shape = shape
        self._tokens = array("i", (draw.randrange(100_000) for _ in range(2 * shape.tokens)))
        self._logprobs = array("f", (-3 * draw.random() for _ in range(2 * shape.tokens)))
        self._text = ("the sum of two numbers is " * (1 + 2 * shape.text_bytes // 26))[: 2 * shape.text_bytes]

    def columns(self, index: int) -> tuple[array[int], array[float], str]:
        """Tokens, log-probabilities and text of sample ``index``."""
        n, at = self.shape.tokens, index % self.shape.tokens
        return self._tokens[at : at + n], self._logprobs[at : at + n], self._text[: self.shape.text_bytes]

    def sample(self, index: int) -> Sample:
        tokens, logprobs, text = self.columns(index)
        return Sample(
            index=index,
            tokens=tokens,
            logprobs=logprobs,
            versions=[[0, len(tokens)]],
            status=SampleStatus.COMPLETED,
            finish_reason="stop",
            reward=float(index % 2),
            text=text,
        )

    def frame(self, source: str, group_index: int, prompt_index: int, epoch: int = 0) -> bytes:
        """The frame of a finished group."""
        prompt = Prompt(source, prompt_index, epoch, f"prompt {prompt_index}", label="y")
        samples = [self.sample(SAMPLES * group_index + i) for i in range(SAMPLES)]
        return encode_group(Group(source, group_index, prompt, array("i", range(PROMPT_TOKENS)), samples))

    def frames(self, count: int) -> Iterator[bytes]:
        for i in range(count):
            yield self.frame("easy", i, i)
