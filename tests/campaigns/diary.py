"""Small real parts of groups run in this process: engines with a diary that can die, prompts, a reward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import anyio
import anyio.lowlevel

from orchestrator.engines import EngineInfo, GenerationEnd, GenerationRequest, ScriptedEngine, TokenSink
from orchestrator.errors import EngineUnavailable
from orchestrator.records import Prompt, Sample
from orchestrator.rewards import RewardResult, RewardStatistics


@dataclass
class Diary:
    """What the engines did, in the order in which they did it; ``version`` is the one in force."""

    version: int = 0
    asked: list[tuple[int, int]] = field(default_factory=list)
    """(sample, tokens it had) of every request."""
    handed: dict[int, list[tuple[int, int, int]]] = field(default_factory=dict)
    """By sample: (first token, number of tokens, version) of all that was handed over."""
    under_way: dict[int, int] = field(default_factory=dict)
    """Tokens that samples have which are being generated."""


class Journaling(ScriptedEngine):
    """Writes the diary, and can die."""

    def __init__(self, diary: Diary, **how: Any) -> None:
        super().__init__(**how)
        self._diary = diary
        self._lives: set[anyio.CancelScope] = set()
        self.is_dead = False

    def die(self) -> None:
        self.is_dead = True
        for scope in self._lives:
            scope.cancel()

    async def probe(self) -> EngineInfo:
        self._must_live()
        return await super().probe()

    async def tokenize(self, text: str) -> list[int]:
        self._must_live()
        return await super().tokenize(text)

    async def detokenize(self, tokens: Sequence[int]) -> str:
        self._must_live()
        return await super().detokenize(tokens)

    def _must_live(self) -> None:
        if self.is_dead:
            raise EngineUnavailable(self.name, "nobody listens")

    async def generate(self, request: GenerationRequest, sink: TokenSink) -> GenerationEnd:
        diary, sample, at = self._diary, request.sample_index, request.generated
        diary.asked.append((sample, at))
        self._must_live()

        def watched(tokens: Sequence[int], logprobs: Sequence[float] | None, text: str) -> None:
            nonlocal at
            diary.handed.setdefault(sample, []).append((at, len(tokens), diary.version))
            at += len(tokens)
            diary.under_way[sample] = at
            sink(tokens, logprobs, text)

        diary.under_way[sample] = at
        scope = anyio.CancelScope()
        self._lives.add(scope)
        try:
            with scope:
                return await super().generate(request, watched)
        finally:
            self._lives.discard(scope)
            del diary.under_way[sample]
        raise EngineUnavailable(self.name, "it died")


class Rows:
    """Prompts of a source, in memory."""

    epochs: int | None = 1

    def __init__(self, name: str, rows: int) -> None:
        self.name = name
        self._rows = rows

    def __len__(self) -> int:
        return self._rows

    def row_at(self, epoch: int, position: int) -> int:
        return position

    async def read(self, prompt_index: int, epoch: int) -> Prompt:
        return Prompt(self.name, prompt_index, epoch, None, tokens=list(f"{self.name} {prompt_index}=".encode()))

    async def aclose(self) -> None:
        return


class One:
    """A reward that is always 1."""

    is_whole_group = False

    async def score(self, samples: Sequence[Sample], prompt: Prompt) -> list[RewardResult]:
        return [RewardResult(1.0) for _ in samples]

    def statistics(self) -> RewardStatistics:
        return RewardStatistics()

    async def aclose(self) -> None:
        return
