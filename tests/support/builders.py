"""Small real things for tests: groups, frames, a journal in memory."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

from orchestrator.core.ledger.events import Event, Launched, decode_event, encode_event
from orchestrator.core.ledger.groups import GroupFacts, Place, StoredGroup
from orchestrator.core.ledger.ledger import Ledger, SourceSize
from orchestrator.frames import encode_group
from orchestrator.records import Group, Prompt, Sample, SampleStatus


def make_sample(index: int, *, length: int = 3, reward: float = 1.0, version: int = 0) -> Sample:
    sample = Sample(index=index, status=SampleStatus.COMPLETED, finish_reason="stop", reward=reward, text="x" * length)
    sample.extend(list(range(length)), [-0.5] * length, version)
    return sample


def make_group(
    source: str = "easy",
    group_index: int = 0,
    *,
    prompt_index: int = 0,
    epoch: int = 0,
    first_sample: int = 0,
    lengths: Sequence[int] = (3, 4),
    rewards: Sequence[float] | None = None,
    version: int = 0,
) -> Group:
    rewards = [1.0] * len(lengths) if rewards is None else rewards
    samples = [
        make_sample(first_sample + i, length=length, reward=reward, version=version)
        for i, (length, reward) in enumerate(zip(lengths, rewards, strict=True))
    ]
    prompt = Prompt(source, prompt_index, epoch, f"prompt {prompt_index}", label="y")
    return Group(source, group_index, prompt, array("i", [1, 2, 3]), samples)


def frame_for(event: Launched, **kwargs: Any) -> bytes:
    """The frame with which a launched group would finish."""
    lengths = kwargs.pop("lengths", (3,) * event.n)
    group = make_group(
        event.source,
        event.group_index,
        prompt_index=event.prompt_index,
        epoch=event.epoch,
        first_sample=event.first_sample,
        lengths=lengths,
        **kwargs,
    )
    return encode_group(group)


class MemoryJournal:
    """A journal that keeps its records in memory, as the log would have them."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.records: list[tuple[str, bytes]] = []

    def _place(self, body: bytes) -> Place:
        return Place(1, len(self.records), len(body))

    def record(self, event: Event) -> None:
        self.ledger.apply(event)
        self.records.append(("event", encode_event(event)))

    def store_group(self, frame: bytes, facts: GroupFacts | None = None, prefix: bytes | None = None) -> StoredGroup:
        stored = self.ledger.put_group(frame, self._place(frame))
        assert facts is None or StoredGroup.of(facts, frame, stored.place) == stored
        self.records.append(("group", frame))
        return stored

    def store_partial(self, frame: bytes) -> None:
        self.ledger.put_partial(frame, self._place(frame))
        self.records.append(("partial", frame))

    @property
    def mark(self) -> int:
        return len(self.records)

    async def written(self, mark: int | None = None) -> None:
        return

    def frame_at(self, place: Place) -> memoryview:
        return memoryview(self.records[place.offset][1])

    def replayed(self, sizes: dict[str, SourceSize], *, start: Ledger | None = None, skip: int = 0) -> Ledger:
        """The fold over the records again, from nothing or from a snapshot's ledger."""
        ledger = start or Ledger(sizes, nonce=self.ledger.leases.nonce)
        for i, (kind, body) in enumerate(self.records[skip:], start=skip):
            place = Place(1, i, len(body))
            if kind == "event":
                ledger.apply(decode_event(body))
            elif kind == "group":
                ledger.put_group(body, place)
            else:
                ledger.put_partial(body, place)
        return ledger


def launch(journal: MemoryJournal, source: str, *, n: int = 2, rows: int = 10) -> Launched | None:
    """Launch the next prompt of a source, in file order."""
    event = journal.ledger.next_launch(source, n, lambda _epoch, position: position % rows)
    if event is not None:
        journal.record(event)
    return event
