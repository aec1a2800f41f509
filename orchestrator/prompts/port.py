"""The port of prompt sources: rows in an order that is a function of the seed.

Invariants:

* A source is opened once and does not change; ``len`` is the number of prompts (rows), from 0.
* The order of an epoch is a function of (seed, source name, epoch) alone; every row comes exactly once an epoch.
* The source holds no position: the cursor ``(epoch, position)`` belongs to the run's ledger.
* A prompt is a function of its row: it can be read again after a restart.
"""

from __future__ import annotations

from typing import Protocol

from orchestrator.records import Prompt

__all__ = ["PromptSource"]


class PromptSource(Protocol):
    """The prompts of one source."""

    @property
    def name(self) -> str:
        """The source's name."""
        ...

    @property
    def epochs(self) -> int | None:
        """How often the prompts are gone through; ``None``: for ever."""
        ...

    def __len__(self) -> int:
        """Number of prompts in one epoch; at least 1."""
        ...

    def row_at(self, epoch: int, position: int) -> int:
        """The row (``prompt_index``) that stands at ``position`` of the order of ``epoch``; O(1) amortised."""
        ...

    async def read(self, prompt_index: int, epoch: int) -> Prompt:
        """The prompt of that row; has a deadline where it takes long.

        Raises:
            PromptUnavailable: this one cannot be had.
            PromptFileError: the row cannot be read any more (the file changed under us).
        """
        ...

    async def aclose(self) -> None:
        """Let go of files and processes."""
        ...
