"""What is known of one group while it is in flight and while it is held: its frame, and the few facts decisions need.

Invariants:

* The frame is the truth; whatever else is known of a finished group is what its header says: it is read from there
  once, or taken from the group that the frame was just made of.
* A frame that cannot be read back is a fact too (``damage``): the group stands in for itself until it is dropped.
* Pure: no clock, no I/O.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from orchestrator.errors import CorruptState, FrameError
from orchestrator.frames import GroupFrame
from orchestrator.records import NO_VERSION, Group

__all__ = ["DropCount", "GroupFacts", "InFlight", "LocatedFrames", "Place", "PromptRef", "StoredGroup"]


class Place(NamedTuple):
    """Where a record's body lies in the log: segment number, byte offset and length of the body."""

    segment: int
    offset: int
    length: int


class LocatedFrames(NamedTuple):
    """Where frames can be read.

    ``descriptors`` are open, and whoever holds this closes them; ``table`` says of each frame which of them it is in,
    at which byte offset, and how many bytes long it is.
    """

    descriptors: list[int]
    table: list[tuple[int, int, int]]


class PromptRef(NamedTuple):
    """One prompt of a source in one epoch."""

    prompt_index: int
    epoch: int


class GroupFacts(NamedTuple):
    """What decisions need to know of a finished group; see :class:`StoredGroup`.

    Whoever makes the group's frame has these at hand, and sends them along: nobody else reads the frame for them.
    """

    source: str
    group_index: int
    prompt: PromptRef
    lengths: tuple[int, ...]
    rewards: tuple[float, ...]
    oldest_version: int | None
    resumed: int
    tokens: int

    @classmethod
    def of(cls, group: Group) -> GroupFacts:
        """What :meth:`StoredGroup.from_frame` says of the frame that ``encode_group`` makes of this group."""
        samples = group.samples
        lengths = tuple([sum([count for _, count in sample.versions]) for sample in samples])
        versions = [v for sample in samples for v, _ in sample.versions if v != NO_VERSION]
        return cls(
            source=group.source,
            group_index=group.group_index,
            prompt=PromptRef(group.prompt.prompt_index, group.prompt.epoch),
            lengths=lengths,
            rewards=tuple([sample.reward for sample in samples]),  # type: ignore[misc]  # a finished one is scored
            oldest_version=min(versions, default=None),
            resumed=sum([sample.metadata.get("pieces", 1) > 1 for sample in samples]),
            tokens=sum(lengths) + len(samples) * len(group.prompt_tokens),
        )


@dataclass(slots=True)
class StoredGroup:
    """A finished group: its frame as stored and sent, and the few facts that decisions need.

    ``lengths`` [n] are response lengths in tokens, ``rewards`` [n]; ``oldest_version`` is ``None`` where no policy
    token exists; ``resumed`` counts samples that hold tokens of more than one piece of generation. ``damage`` says why
    the frame could not be read back; it is set during a restart only, which ends by dropping such groups. ``entry`` is
    what a snapshot says of the group: where its frame is, and whose it is should the frame be lost. It is made once, so
    that a snapshot of ten thousand groups makes no object for any of them.
    """

    source: str
    group_index: int
    prompt: PromptRef
    frame: bytes | memoryview
    place: Place
    lengths: tuple[int, ...]
    rewards: tuple[float, ...]
    oldest_version: int | None
    resumed: int
    tokens: int
    damage: str | None = None
    entry: tuple[Place, int, PromptRef] = field(init=False)

    def __post_init__(self) -> None:
        self.entry = (self.place, self.group_index, self.prompt)

    @classmethod
    def lost(cls, source: str, group_index: int, prompt: PromptRef, place: Place, damage: str) -> StoredGroup:
        """A group whose frame cannot be read back: it stands in until the rest of the log is replayed."""
        return cls(source, group_index, prompt, b"", place, (), (), None, 0, 0, damage)

    @classmethod
    def from_entry(cls, source: str, entry: list[Any], frame_at: Callable[[Place], bytes | memoryview]) -> StoredGroup:
        """The group of a snapshot's entry (see ``entry``); in format 1 that is its place alone.

        Raises:
            CorruptState, FrameError: its frame cannot be read, and the entry does not say whose it was.
        """
        has_identity = isinstance(entry[0], list)
        place = Place(*entry[0]) if has_identity else Place(*entry)
        try:
            group = cls.from_frame(frame_at(place), place)
            if has_identity and [group.group_index, *group.prompt] != [entry[1], *entry[2]]:
                raise CorruptState(f"{place} has group {group.group_index} instead of group {entry[1]}")
        except (CorruptState, FrameError) as error:
            if not has_identity:
                raise
            return cls.lost(source, entry[1], PromptRef(*entry[2]), place, str(error))
        return group

    def move(self, frame: bytes | memoryview, place: Place) -> None:
        """The frame was copied to another place of the log; a group that was lost is whole again."""
        if self.damage is None:
            self.frame, self.place = frame, place
            self.entry = (place, self.group_index, self.prompt)
        else:
            whole = self.from_frame(frame, place)
            for name in self.__slots__:
                setattr(self, name, getattr(whole, name))

    @classmethod
    def from_frame(cls, frame: bytes | memoryview, place: Place) -> StoredGroup:
        """Read the facts from the frame's header.

        Raises:
            FrameError: not a group frame.
        """
        view = GroupFrame(frame)
        header = view.header
        samples = header["samples"]
        lengths = tuple(sum(count for _, count in sample["versions"]) for sample in samples)
        versions = [v for sample in samples for v, _ in sample["versions"] if v != NO_VERSION]
        _, begin, end = header["columns"]["prompt_tokens"]
        return cls(
            source=header["source"],
            group_index=header["group_index"],
            prompt=PromptRef(header["prompt_index"], header["epoch"]),
            frame=frame,
            place=place,
            lengths=lengths,
            rewards=tuple(sample["reward"] for sample in samples),
            oldest_version=min(versions, default=None),
            resumed=sum(1 for sample in samples if sample["metadata"].get("pieces", 1) > 1),
            tokens=sum(lengths) + len(samples) * ((end - begin) // 4),
        )

    @classmethod
    def of(cls, facts: GroupFacts, frame: bytes, place: Place) -> StoredGroup:
        """The group of a frame that these are the facts of, without reading it."""
        return cls(
            source=facts.source,
            group_index=facts.group_index,
            prompt=facts.prompt,
            frame=frame,
            place=place,
            lengths=facts.lengths,
            rewards=facts.rewards,
            oldest_version=facts.oldest_version,
            resumed=facts.resumed,
            tokens=facts.tokens,
        )


@dataclass(slots=True)
class InFlight:
    """A launched group that is not finished; ``partials`` are its partial frames in the order of writing.

    ``damage`` says why one of them could not be read back; see :class:`StoredGroup`.
    """

    source: str
    group_index: int
    first_sample: int
    n: int
    prompt: PromptRef
    overtaken: int = 0
    partials: list[tuple[Place, bytes | memoryview]] = field(default_factory=list)
    damage: str | None = None

    def load_partials(self, places: list[list[int]], frame_at: Callable[[Place], bytes | memoryview]) -> None:
        """Read the partial frames that a snapshot lists; those that cannot be read are noted as ``damage``."""
        for place in places:
            try:
                frame = frame_at(Place(*place))
                owner = GroupFrame(frame).header["group_index"]
                if owner != self.group_index:
                    raise CorruptState(f"{Place(*place)} belongs to group {owner}")
            except (CorruptState, FrameError) as error:
                self.damage = str(error)
            else:
                self.partials.append((Place(*place), frame))


@dataclass(slots=True)
class DropCount:
    """What was dropped under one reason: groups, samples, their response tokens, the longest response."""

    groups: int = 0
    samples: int = 0
    tokens: int = 0
    longest: int = 0

    def add(self, lengths: list[int]) -> None:
        """Count one group whose samples have these response lengths."""
        self.groups += 1
        self.samples += len(lengths)
        self.tokens += sum(lengths)
        self.longest = max(self.longest, *lengths) if lengths else self.longest
