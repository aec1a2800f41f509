"""A group while it is worked on: its samples, and what of them the log knows.

Invariants:

* It decides what has to be stored or recorded and leaves the doing to ``local_runner``.
* A sample's delta begins where the one before it ended; a sample that was begun anew is stored from its beginning.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Self

import anyio

from orchestrator.core.ledger.groups import InFlight
from orchestrator.core.ledger.partials import encode_partial, restore_samples
from orchestrator.records import Message, Prompt, Sample

__all__ = ["GroupProgress", "GroupStanding"]


@dataclass(frozen=True, slots=True)
class GroupStanding:
    """How far a group is.

    ``running_s``: seconds that it has been worked on since it was launched or the daemon started; ``generating``: index
    and number of tokens so far of each sample that is not finished, the longest first; ``unscored``: samples that are
    finished and have no reward yet.
    """

    group_index: int
    running_s: float
    generating: tuple[tuple[int, int], ...]
    unscored: int


@dataclass(slots=True)
class GroupProgress:
    """See the module's invariants; made by :meth:`resume`.

    ``prompt`` has no content until it was read; ``messages``: see
    :class:`~.prompt_reader.ReadPrompt`;
    ``stored[i]`` is the token array of sample i that the log knows, and how many tokens of it: a sample that was begun
    anew has another array; ``scope`` is what the group is worked on in.
    """

    launched: InFlight
    prompt: Prompt
    prompt_tokens: array[int]
    samples: list[Sample]
    stored: list[tuple[array[int], int]]
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    messages: list[Message] | None = None
    replacements: int = 0
    failure: str | None = None

    @classmethod
    def resume(cls, launched: InFlight) -> Self:
        """A launched group, with what its partial frames have of its samples."""
        samples = restore_samples(launched.first_sample, launched.n, [frame for _, frame in launched.partials])
        return cls(
            launched=launched,
            prompt=Prompt(launched.source, launched.prompt.prompt_index, launched.prompt.epoch, None),
            prompt_tokens=array("i"),
            samples=samples,
            stored=[(sample.tokens, len(sample.tokens)) for sample in samples],
        )

    def fail(self, reason: str) -> None:
        """Give the group up: its siblings need not go on."""
        self.failure = self.failure or reason
        self.scope.cancel()

    def standing(self, running_s: float) -> GroupStanding:
        """How far the group is, ``running_s`` seconds after it was begun."""
        generating = [(sample.index, len(sample.tokens)) for sample in self.samples if not sample.is_finished]
        return GroupStanding(
            group_index=self.launched.group_index,
            running_s=round(running_s, 3),
            generating=tuple(sorted(generating, key=lambda sample: (-sample[1], sample[0]))),
            unscored=sum(1 for sample in self.samples if sample.is_finished and sample.reward is None),
        )

    def gained(self, slot: int) -> bytes:
        """What a sample gained since it was stored last, as the partial frame that is now to be stored."""
        sample, (known, count) = self.samples[slot], self.stored[slot]
        start = count if known is sample.tokens else 0
        frame = encode_partial(
            source=self.launched.source,
            group_index=self.launched.group_index,
            slot=slot,
            sample=sample,
            start=start,
        )
        self.stored[slot] = (sample.tokens, len(sample.tokens))
        return frame

    def unsaved(self) -> Iterator[int]:
        """The slots of samples that a restart could not have otherwise."""
        for slot, sample in enumerate(self.samples):
            is_news = self.stored[slot] != (sample.tokens, len(sample.tokens))
            if sample.is_finished or (sample.tokens and (is_news or sample.finish_reason is not None)):
                yield slot
