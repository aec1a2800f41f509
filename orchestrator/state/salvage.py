"""What a restart does about damage: cut it off, keep it aside, name what is lost, run its prompts again.

Invariants:

* Nothing is deleted: what cannot be used is kept in ``*.damaged`` files, unless the disk has no room for a copy.
* After a cut the log is whole again: each number from the snapshot's segment on has a file that is read to its end, so
  that what is written next is found by the next restart.
* A group that was lost is dropped under the reason ``damaged``, and its prompt runs again; of a leased batch only that
  group is missing when it is handed out again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from orchestrator.core.ledger.events import Dropped, Event
from orchestrator.core.ledger.ledger import DAMAGED, Ledger
from orchestrator.errors import StateError

from .segments import SEGMENT_HEADER_BYTES, LogPosition, segment_header, segment_path

__all__ = ["cut_off", "drop_damaged", "set_aside"]

MAX_NAMED: Final = 100
"""Damaged groups named one by one; the others are counted."""

COPY_BYTES: Final = 1 << 20


def _free_name(path: Path) -> Path:
    """``<name>.damaged``, or with a number where an earlier restart has left one."""
    candidates = (path.with_suffix(".damaged" if i == 1 else f".damaged-{i}") for i in range(1, 10_000))
    return next(candidate for candidate in candidates if not candidate.exists())


def set_aside(path: Path) -> Path:
    """Rename a file that cannot be used; returns its new name."""
    return path.rename(_free_name(path))


def cut_off(directory: Path, start: LogPosition, offset: int, end: int) -> str:
    """Cut the log at a byte offset of segment ``start.segment``; returns a clause that says what was lost.

    Args:
        directory: the state directory.
        start: where reading this segment began.
        offset: of the damage in it; 0: nothing of the file can be used.
        end: the number after the last segment.

    Raises:
        StateError: the disk fails.
    """
    number = start.segment
    later = [path for n in range(end - 1, number, -1) if (path := segment_path(directory, n)).exists()]
    path = segment_path(directory, number)
    size = path.stat().st_size if path.exists() else 0
    lost = size - offset + sum(other.stat().st_size for other in later)
    try:
        for other in later:  # the last one first: what is left is a prefix at every moment
            set_aside(other)
        kept = _keep(path, offset) if size > offset else "nothing"
        if offset < SEGMENT_HEADER_BYTES:
            _renew(path, number, start.offset)
        else:
            os.truncate(path, max(offset, start.offset))
        for n in range(number + 1, end):
            _renew(segment_path(directory, n), n, SEGMENT_HEADER_BYTES)
        _sync(path, directory)
    except OSError as error:
        raise StateError(
            f"cannot set damaged files in {directory} aside: {error.strerror or error}: make space or repair the disk,"
            " then start again"
        ) from error
    return f"{max(0, lost)} bytes from there on were not used; {kept} was set aside"


def _keep(path: Path, offset: int) -> str:
    """Keep the bytes from ``offset`` on, and take the file away if that is all of it."""
    if offset < SEGMENT_HEADER_BYTES:
        return set_aside(path).name
    copy = _free_name(path)
    try:
        with path.open("rb") as source, copy.open("wb") as target:
            source.seek(offset)
            while block := source.read(COPY_BYTES):
                target.write(block)
    except OSError as error:  # a torn tail on a full disk must not keep the daemon from starting
        copy.unlink(missing_ok=True)
        return f"nothing ({error.strerror})"
    return copy.name


def _renew(path: Path, number: int, size: int) -> None:
    """A segment without records that ends at ``size``; the gap before a snapshot's position is never read."""
    with path.open("wb") as file:
        file.write(segment_header(number))
        file.truncate(size)


def _sync(path: Path, directory: Path) -> None:
    for name, flags in ((path, os.O_WRONLY), (directory, os.O_RDONLY | os.O_DIRECTORY)):
        fd = os.open(name, flags | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def drop_damaged(ledger: Ledger, problems: list[str]) -> list[Event]:
    """Drop every group that could not be read back whole; names them in ``problems``.

    One that was trained on, and waited for the archive, is named alone: the archive leaves it out and counts it.
    Called once everything is replayed: what was acknowledged since the snapshot is no loss.

    Returns:
        The events, applied already.
    """
    drops: list[Event] = []
    for i, (source, index, where, reason) in enumerate(list(_damaged(ledger))):
        if i < MAX_NAMED:
            problems.append(f"group {index} of {source} ({where}) was lost, and its prompt will run again: {reason}")
        drops.append(Dropped(source=source, group_index=index, reason=DAMAGED, rerun=True))
        ledger.apply(drops[-1])
    if len(drops) > MAX_NAMED:
        problems.append(f"{len(drops) - MAX_NAMED} more groups were lost; their prompts will run again")
    trained = [(batch, group) for batch in ledger.unarchived.batches.values() for group in batch.groups.values()]
    lost = [(batch.key.step, group) for batch, group in trained if group.damage is not None]
    for step, group in lost[:MAX_NAMED]:
        problems.append(
            f"group {group.group_index} of {group.source} (trained on at step {step}) was lost before it was archived:"
            f" {group.damage}"
        )
    if len(lost) > MAX_NAMED:
        problems.append(f"{len(lost) - MAX_NAMED} more groups were lost before they were archived")
    return drops


def _damaged(ledger: Ledger) -> Iterator[tuple[str, int, str, str]]:
    for state in ledger.sources.values():
        for launched in state.in_flight.values():
            if launched.damage is not None:
                yield state.name, launched.group_index, "in flight", launched.damage
        for group in state.ready.values():
            if group.damage is not None:
                yield state.name, group.group_index, "buffered", group.damage
    for batch, share in ledger.leases.open_shares():
        for group in share.groups:
            if group.damage is not None:
                yield group.source, group.group_index, f"leased at step {batch.step}", group.damage
