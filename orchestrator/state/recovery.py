"""The restart: the newest sound snapshot, then the records after it.

Invariants:

* What is read back is a prefix of what was written: reading ends at the first record that does not hold, and the
  ledger is what it was at that moment; what lies after it is kept in ``*.damaged`` files, and is never used.
* A frame that the snapshot needs and that cannot be read back costs its own group alone (:mod:`.salvage`).
* Whatever is lost is named in ``problems``.
* Recovering may end at any instruction, and be done again with the same result: numbers of segments stay without a gap,
  and what is in the way is put aside from the log's end backwards.
* State of another configuration or of another format is refused before anything is changed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from orchestrator.core.ledger.events import CheckpointLoaded, Event, SourceFacts, SourcesChanged, decode_event
from orchestrator.core.ledger.ledger import Ledger, SourceSize
from orchestrator.core.ledger.source_changes import SourceChanges
from orchestrator.errors import (
    CheckpointError,
    CorruptState,
    ForeignState,
    FrameError,
    SourceUnknown,
    StateError,
    VersionWentBack,
)

from .checkpoints import checkpoint_checksum, read_checkpoint, relink, tidy_checkpoints, verify_checkpoint
from .mapped import Segments
from .origin import FIRST_SEGMENT, NOTHING, find_origin, first_number
from .salvage import cut_off, drop_damaged, set_aside
from .segments import (
    RECORD_PREFIX_BYTES,
    SEGMENT_HEADER_BYTES,
    Damage,
    LogPosition,
    Record,
    RecordKind,
    Segment,
    decode_continues,
    decode_moved,
    list_segments,
    segment_path,
)
from .snapshots import Kept, kept_by, list_snapshots, list_unfinished, read_snapshot, snapshot_path

__all__ = ["AS_CONFIGURED", "OpenCheckpoint", "Recovery", "SourceRules", "open_checkpoint", "recover"]


@dataclass(slots=True)
class Recovery:
    """What a restart found.

    ``snapshot`` is the number of the snapshot it began from (``None``: from nothing), ``records`` how many were
    replayed after it, ``problems`` what was damaged, in words; ``next_segment`` the first number that is free, and
    ``end`` where the log before it ends (``None``: there is none). ``drops`` (of damaged groups,
    and a change of the sources) are applied to the ledger already, and are to be the first records of that segment.
    """

    snapshot: int | None = None
    records: int = 0
    problems: list[str] = field(default_factory=list)
    next_segment: int = FIRST_SEGMENT
    end: LogPosition | None = None
    kept: Kept = field(default_factory=lambda: Kept(FIRST_SEGMENT, frozenset()))
    drops: list[Event] = field(default_factory=list)

    @property
    def is_fresh(self) -> bool:
        """Whether there was no state at all."""
        return self.snapshot is None and self.records == 0


@dataclass(frozen=True, slots=True)
class SourceRules:
    """Which sources the state should have, where that is more than "those of the config".

    ``at_run_time``: the sources that there should be, given what was done to those of the config at run time.
    ``allow_changes``: the state may be of other sources; those that differ change (``core.ledger.changed_sources``).
    """

    at_run_time: Callable[[SourceChanges], dict[str, SourceSize]] | None = None
    allow_changes: bool = False


AS_CONFIGURED: Final = SourceRules()
"""The sources of the config and no others."""


def recover(
    directory: Path, sizes: dict[str, SourceSize], nonce: str, rules: SourceRules = AS_CONFIGURED
) -> tuple[Ledger, Recovery]:
    """The ledger that ``directory`` holds. Blocks: call it in a worker thread.

    Args:
        directory: the state directory; its lock is held.
        sizes: the sources of the config.
        nonce: for the leases of a fresh ledger.
        rules: how the two come together.

    Raises:
        ForeignState: the state is of other sources, and that is not allowed.
        CorruptState: neither a snapshot nor the log from its beginning can be read.
        StateError: the state is of another format, or the disk fails.
    """
    recovery = Recovery()
    try:
        tidy_checkpoints(directory)  # first: the log may say that one of them was loaded
        numbers = list_segments(directory)
        recovery.next_segment = max(numbers) + 1 if numbers else first_number(directory)
        segments = Segments(directory)
        ledger, position = _start(directory, sizes, nonce, segments, recovery)
        _replay(ledger, segments, position, recovery)
        recovery.end = _end(directory, recovery.next_segment - 1)
        for path in list_unfinished(directory):
            with suppress(OSError):
                path.unlink()
    except StateError:
        raise
    except OSError as error:
        raise StateError(
            f"cannot read the state in {directory}: {error.strerror or error}: repair the disk, or restore the"
            " directory from a copy"
        ) from error
    recovery.drops = drop_damaged(ledger, recovery.problems)
    if rules.at_run_time is not None:
        sizes = rules.at_run_time(ledger.source_changes)
    if not rules.allow_changes:
        _check_sources(directory, {name: state.rows for name, state in ledger.sources.items()}, sizes)
    if (change := _source_change(ledger, sizes)) is not None:
        ledger.apply(change)
        recovery.drops.append(change)
    return ledger, recovery


def _source_change(ledger: Ledger, sizes: dict[str, SourceSize]) -> SourcesChanged | None:
    """From the sources of the state to those of the config; ``None`` if they are the same in the same order."""
    states = [(name, state.rows, state.epochs) for name, state in ledger.sources.items()]
    if states == [(name, size.rows, size.epochs) for name, size in sizes.items()]:
        return None
    return SourcesChanged([SourceFacts(name, *size) for name, size in sizes.items()])


def _start(
    directory: Path, sizes: dict[str, SourceSize], nonce: str, segments: Segments, recovery: Recovery
) -> tuple[Ledger, LogPosition]:
    """The newest snapshot's ledger, or an empty one where the whole log is there."""
    damaged: list[int] = []
    for number in list_snapshots(directory):
        try:
            data = read_snapshot(directory, number)
            position = LogPosition(*data["position"])
            ledger = Ledger({}, nonce=data["ledger"]["nonce"])
            ledger.load(data["ledger"], segments.frame)
        except (CorruptState, FrameError, KeyError, TypeError) as error:
            recovery.problems.append(f"skipped snapshot {number}: {error}")
            damaged.append(number)
            continue
        recovery.snapshot = number
        recovery.kept = kept_by(data)
        break
    else:
        numbers = list_segments(directory)
        origin = find_origin(directory) if numbers else recovery.next_segment
        if origin is None:
            detail = "; ".join(recovery.problems) or "there is no snapshot"
            raise CorruptState(
                f"{directory}: the log starts at segment {numbers[0]} and no snapshot can be read ({detail});"
                " restore the directory from a copy, or start a new run in another run.state_dir"
            )
        ledger, position = Ledger(sizes, nonce=nonce), LogPosition(origin, SEGMENT_HEADER_BYTES)
    for number in damaged:
        set_aside(snapshot_path(directory, number))
    return ledger, position


def _check_sources(directory: Path, theirs: dict[str, int], sizes: dict[str, SourceSize]) -> None:
    """Raises ``ForeignState``: what is there has other sources, or other numbers of prompts."""
    ours = {name: size.rows for name, size in sizes.items()}
    if theirs != ours:
        raise ForeignState(
            f"the state in {directory} has other sources: it has {_listed(theirs)}; the config has {_listed(ours)}."
            " Restore the sources and their prompt files. If the change is intended, start with"
            " --allow-source-changes, or start a new run in another run.state_dir"
        )


def _listed(sources: dict[str, int]) -> str:
    return ", ".join(f"{name} ({rows} prompts)" for name, rows in sources.items())


def _replay(ledger: Ledger, segments: Segments, position: LogPosition, recovery: Recovery) -> None:
    """Apply the records from ``position`` on, up to the first one that does not hold."""
    if recovery.snapshot is not None:  # whatever is in the directory, that number is not free
        recovery.next_segment = max(recovery.next_segment, position.segment + 1)
    end = None
    for number in range(position.segment, recovery.next_segment):
        start = position if number == position.segment else LogPosition(number, SEGMENT_HEADER_BYTES)
        try:
            segment = segments.get(number)
        except CorruptState as error:
            damage: Damage | None = Damage(0, str(error))
        else:
            damage = _replay_segment(ledger, segments, segment, start.offset, end, recovery)
            end = LogPosition(number, len(segment.view))
        if damage is not None:
            lost = cut_off(segments.directory, start, damage.offset, recovery.next_segment)
            recovery.problems.append(f"{damage.reason}; {lost}")
            return


def _replay_segment(
    ledger: Ledger, segments: Segments, segment: Segment, offset: int, before: LogPosition | None, recovery: Recovery
) -> Damage | None:
    """Apply one segment's records; ``before`` is where the segment before it was read to, if it was."""
    size = len(segment.view)
    if size < offset and (segment.view or offset > SEGMENT_HEADER_BYTES):
        return Damage(size, f"{segment.path.name} ends at offset {size}, {offset - size} bytes too early")
    if not segment.view:
        return None
    blemishes = 0
    damage = None
    for record in segment.records(offset):
        damage = record if isinstance(record, Damage) else _apply(ledger, segments, record, before)
        if damage is not None:
            damage = Damage(damage.offset, f"{segment.path.name}, offset {damage.offset}: {damage.reason}")
            break
        recovery.records += 1
        blemishes += isinstance(record, Record) and record.is_blemished
    if blemishes:
        recovery.problems.append(
            f"{segment.path.name}: unused bytes next to {blemishes} records were changed; nothing was lost"
        )
    return damage


def _end(directory: Path, number: int) -> LogPosition | None:
    """Where the log ends if ``number`` is its last segment; ``None`` if its first one is to be ``FIRST_SEGMENT``."""
    if number < FIRST_SEGMENT:
        return None
    if not (path := segment_path(directory, number)).exists():
        return NOTHING
    size = path.stat().st_size
    return LogPosition(number, size if size >= SEGMENT_HEADER_BYTES else 0)


def _apply(ledger: Ledger, segments: Segments, record: Record, before: LogPosition | None) -> Damage | None:
    try:
        match record.kind:
            case RecordKind.EVENT:
                _apply_event(ledger, segments, decode_event(record.body))
            case RecordKind.GROUP:
                ledger.put_group(record.body, record.place)
            case RecordKind.PARTIAL:
                ledger.put_partial(record.body, record.place)
            case RecordKind.MOVED:
                old, frame = decode_moved(record)
                ledger.move(frame, old, record.place)
            case RecordKind.CONTINUES:
                if before not in (None, decode_continues(record)):
                    raise CorruptState(
                        f"the previous segment ended at {decode_continues(record)}, but now ends at {before}"
                    )
    except (CheckpointError, CorruptState, FrameError, VersionWentBack, msgspec.MsgspecError) as error:
        return Damage(record.place.offset - RECORD_PREFIX_BYTES, str(error))
    except SourceUnknown as error:  # without a snapshot nothing has told before whose state this is
        raise ForeignState(
            f"the log has other sources: {error}. Restore the sources and their prompt files, or start a new run in"
            " another run.state_dir"
        ) from error
    return None


def _apply_event(ledger: Ledger, segments: Segments, event: Event) -> None:
    if not isinstance(event, CheckpointLoaded):
        ledger.apply(event)
        return
    data = read_checkpoint(segments.directory, event.name)
    if checkpoint_checksum(segments.directory, event.name) != event.checksum:
        raise CorruptState(f"checkpoint {event.name!r} is not the one that was loaded")
    ledger.restore(data["ledger"], segments.frame, event.nonce)


class OpenCheckpoint(NamedTuple):
    """A checkpoint whose frames can be read: its snapshot, that one's checksum, and the segments with its frames."""

    data: dict[str, Any]
    checksum: int
    segments: Segments


def open_checkpoint(directory: Path, name: str, sizes: dict[str, SourceSize], *, end: int) -> OpenCheckpoint:
    """Check a checkpoint wholly, and put its segments beside those of the log. Blocks.

    Args:
        directory: of the state.
        name: of the checkpoint.
        sizes: the sources of the state.
        end: number of the segment that is being written.

    Raises:
        CheckpointError: there is none of that name, it is damaged, or of another state.
        ForeignState: it is of other sources.
        StateError: the disk failed, or it is of another format.
    """
    try:
        data = read_checkpoint(directory, name)
        theirs = {source: state["rows"] for source, state in data["ledger"]["sources"].items()}
        _check_sources(directory, theirs, sizes)
        if problems := verify_checkpoint(directory, name):
            raise CheckpointError(f"checkpoint {name!r} is damaged: {'; '.join(problems[:3])}")
        relink(directory, name, data, end=end)
        return OpenCheckpoint(data, checkpoint_checksum(directory, name), Segments(directory))
    except StateError:
        raise
    except OSError as error:
        raise StateError(f"checkpoint {name!r} was not loaded: {error}") from error
