"""Which frames to copy to the log's end, so that sparse segments can be let go of, and the copies.

Invariants:

* Nothing here touches the loop: frames are found, read (from the disk, after a restart) and copied in worker threads.
* A copy is a record of its own; the frame it stands for is let go of only when the record is queued.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from orchestrator.core.ledger.groups import Place, StoredGroup

from .segments import RecordKind, encode_moved, encode_prefix

__all__ = ["Frame", "Moved", "copies", "slices", "sparse_frames"]

SPARSE_SHARE: Final = 0.25
"""A segment of which less than this share is live is copied on; full ones are left alone."""

SLICE_BYTES: Final = 1 << 20
"""Copied between two turns of the loop: a millisecond or two of a worker thread."""

SLICE_FRAMES: Final = 64
"""Moved in the ledger between two turns of the loop: less than a millisecond of the loop's thread."""

Frame = tuple[Place, bytes | memoryview]
"""A frame and where it lies."""


class Moved(NamedTuple):
    """A ``MOVED`` record to be queued, and the place that its frame leaves."""

    old: Place
    prefix: bytes
    body: bytes


def sparse_frames(
    groups: Sequence[StoredGroup], partials: Sequence[Frame], before: int, segment_bytes: int
) -> list[Frame]:
    """The frames of the segments below ``before`` that hold little else.

    Args:
        groups: all that are live.
        partials: partial frames that are live.
        before: number of the segment that is being written.
        segment_bytes: of a full segment.
    """
    frames = [*((group.place, group.frame) for group in groups), *partials]
    live: Counter[int] = Counter()
    for place, _ in frames:
        live[place.segment] += place.length
    sparse = {number for number, size in live.items() if number < before and size < SPARSE_SHARE * segment_bytes}
    return [frame for frame in frames if frame[0].segment in sparse]


def slices(frames: Sequence[Frame]) -> Iterator[list[Frame]]:
    """Cut into slices of at most ``SLICE_BYTES`` and ``SLICE_FRAMES``, and of at least one frame."""
    some: list[Frame] = []
    size = 0
    for frame in frames:
        if some and (size + len(frame[1]) > SLICE_BYTES or len(some) == SLICE_FRAMES):
            yield some
            some, size = [], 0
        some.append(frame)
        size += len(frame[1])
    if some:
        yield some


def copies(frames: Sequence[Frame]) -> list[Moved]:
    """The records that move these frames."""
    bodies = ((place, encode_moved(place, frame)) for place, frame in frames)
    return [Moved(place, encode_prefix(RecordKind.MOVED, body), body) for place, body in bodies]
