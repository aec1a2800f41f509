"""Where a log begins.

Invariants:

* The first segment is number 1; where checkpoints were there before the log, it is the number after all of theirs.
  So nothing is ever written to a file that a checkpoint keeps.
* A first segment of another number says by its first record that nothing was before it: that tells it from a log that
  has lost its beginning.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from orchestrator.errors import CorruptState

from .checkpoints import checkpoint_segments
from .segments import LogPosition, Record, RecordKind, Segment, decode_continues, list_segments
from .snapshots import list_snapshots

__all__ = ["FIRST_SEGMENT", "NOTHING", "find_origin", "first_number"]

FIRST_SEGMENT: Final = 1

NOTHING: Final = LogPosition(0, 0)
"""What a first segment continues, if its number is not :data:`FIRST_SEGMENT`."""


def first_number(directory: Path) -> int:
    """The number of the first segment of a log that is to begin here."""
    return max(checkpoint_segments(directory), default=FIRST_SEGMENT - 1) + 1


def find_origin(directory: Path) -> int | None:
    """The number of the segment with which the log begins; ``None`` if that is not there, or there is no log."""
    numbers = list_segments(directory)
    for number in reversed(numbers):  # before it may be what was linked from a checkpoint, of another log
        if _is_origin(directory, number):
            return number
    if numbers[:1] == [FIRST_SEGMENT]:
        return FIRST_SEGMENT
    own = sorted(set(numbers) - checkpoint_segments(directory))
    if len(own) == 1 and _first_record(directory, own[0]) is None and not list_snapshots(directory):
        return own[0]  # it was begun, and nothing was recorded
    return None


def _is_origin(directory: Path, number: int) -> bool:
    record = _first_record(directory, number)
    return record is not None and record.kind is RecordKind.CONTINUES and decode_continues(record) == NOTHING


def _first_record(directory: Path, number: int) -> Record | None:
    try:
        item = next(Segment(directory, number).records(), None)
    except CorruptState:
        return None
    return item if isinstance(item, Record) else None
