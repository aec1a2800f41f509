"""Named checkpoints: a snapshot, and hard links to the segments of the log that hold its frames.

A checkpoint is a directory ``checkpoints/NAME`` in the state directory. No payload is copied: a link to a segment keeps
it on the disk when the log has let go of it.

Invariants:

* A checkpoint is whole or it is not there: made under another name, synced, renamed; renamed, then removed. One of the
  same name is replaced. What a crash leaves half done is tidied up at the next start.
* It is never changed. Segments are only ever appended to, and the snapshot says which of their records count.
* Everything here blocks: call it in a worker thread.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import google_crc32c

from orchestrator.core.ledger.groups import Place
from orchestrator.errors import BadRequest, CheckpointError, CorruptState, StateError

from .segments import Segment, list_segments, segment_path
from .snapshots import kept_by, read_snapshot, snapshot_head, snapshot_path

__all__ = [
    "CheckpointFacts",
    "check_name",
    "checkpoint_checksum",
    "checkpoint_segments",
    "list_checkpoints",
    "read_checkpoint",
    "relink",
    "remove_checkpoint",
    "save_checkpoint",
    "tidy_checkpoints",
    "verify_checkpoint",
]

FOLDER: Final = "checkpoints"
NUMBER: Final = 1
"""Of the one snapshot in a checkpoint."""

UNFINISHED: Final = ".unfinished"
OLD: Final = ".old"
REMOVED: Final = ".removed"
"""What directories are called, after a dot and the checkpoint's name, while it is made, replaced, removed."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True, slots=True)
class CheckpointFacts:
    """What is told of a checkpoint.

    ``groups`` are those buffered and leased; ``size_bytes`` is the log that it keeps on the disk; ``saved_at`` in
    seconds since the epoch. Of one that cannot be read only name, size and ``damage`` are known.
    """

    name: str
    size_bytes: int
    step: int | None = None
    policy_version: int | None = None
    groups: int | None = None
    saved_at: float = 0.0
    damage: str | None = None


def check_name(name: str) -> None:
    """A checkpoint's name is one of a directory.

    Raises:
        BadRequest: it is not.
    """
    if _NAME.fullmatch(name) is None:
        raise BadRequest(
            f"{name[:80]!r} cannot be the name of a checkpoint: use 1 to 64 of A-Z a-z 0-9 _ . -,"
            " not starting with . or -"
        )


def _path(directory: Path, name: str) -> Path:
    check_name(name)
    return directory / FOLDER / name


# -- saving -----------------------------------------------------------------------------------------------------------


def save_checkpoint(directory: Path, name: str, text: bytes, segments: Iterable[int]) -> None:
    """Make a checkpoint of a snapshot whose frames are synced.

    Args:
        directory: of the state.
        name: of the checkpoint.
        text: the snapshot as JSON.
        segments: of the log, that hold its frames.

    Raises:
        OSError: the disk failed; no checkpoint is left half made.
    """
    path = _path(directory, name)
    unfinished = path.with_name(f".{name}{UNFINISHED}")
    _remove(unfinished)
    unfinished.mkdir(parents=True, mode=0o700)
    try:
        for number in sorted(segments):
            os.link(segment_path(directory, number), segment_path(unfinished, number))
        with snapshot_path(unfinished, NUMBER).open("xb") as file:
            file.write(snapshot_head(text))
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        _sync(unfinished)
        _put_in_place(unfinished, path)
    except OSError:
        _remove(unfinished)
        raise


def _put_in_place(unfinished: Path, path: Path) -> None:
    old = path.with_name(f".{path.name}{OLD}")
    _remove(old)
    if path.exists():
        path.rename(old)
    unfinished.rename(path)
    _sync(path.parent)
    _remove(old)


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)


def remove_checkpoint(directory: Path, name: str) -> None:
    """Let a checkpoint go: at one instant it is there whole, at the next it is no more.

    Raises:
        OSError: the disk failed.
    """
    path = _path(directory, name)
    gone = path.with_name(f".{name}{REMOVED}")
    _remove(gone)
    path.rename(gone)
    _remove(gone)


def tidy_checkpoints(directory: Path) -> None:
    """After a crash: what was half made or half removed goes; what was to be replaced, and was not, is there again.

    Raises:
        OSError: the disk failed.
    """
    folder = directory / FOLDER
    for path in folder.glob(".*") if folder.is_dir() else ():
        name = path.name.removeprefix(".").removesuffix(OLD)
        if path.name.endswith(OLD) and not (folder / name).exists():
            path.rename(folder / name)
        elif path.suffix in (OLD, UNFINISHED, REMOVED):
            _remove(path)


# -- reading ----------------------------------------------------------------------------------------------------------


def list_checkpoints(directory: Path) -> list[CheckpointFacts]:
    """All checkpoints, in the order in which they were saved."""
    folder = directory / FOLDER
    if not folder.is_dir():
        return []
    names = [entry.name for entry in folder.iterdir() if _NAME.fullmatch(entry.name) and entry.is_dir()]
    found = []
    for name in names:
        with suppress(FileNotFoundError):  # it is removed at this moment
            found.append(_facts(directory, name))
    return sorted(found, key=lambda fact: (fact.saved_at, fact.name))


def _facts(directory: Path, name: str) -> CheckpointFacts:
    path = _path(directory, name)
    size_bytes = sum(entry.stat().st_size for entry in path.iterdir())
    try:
        ledger = read_checkpoint(directory, name)["ledger"]
    except StateError as error:
        return CheckpointFacts(name, size_bytes, damage=error.message)
    leased = sum(len(groups) for batch in ledger["leases"] for _, groups in batch["shares"])
    return CheckpointFacts(
        name=name,
        size_bytes=size_bytes,
        step=ledger["step"],
        policy_version=ledger["policy_version"],
        groups=leased + sum(len(state["ready"]) for state in ledger["sources"].values()),
        saved_at=snapshot_path(path, NUMBER).stat().st_mtime,
    )


def read_checkpoint(directory: Path, name: str) -> dict[str, Any]:
    """The snapshot of a checkpoint.

    Raises:
        CheckpointError: there is none of that name, or it is damaged.
        StateError: it is of a format that this version does not read.
    """
    path = _path(directory, name)
    try:
        return read_snapshot(path, NUMBER)
    except FileNotFoundError:
        entries = path.parent.iterdir() if path.parent.is_dir() else ()
        known = sorted(entry.name for entry in entries if _NAME.fullmatch(entry.name))
        raise CheckpointError(
            f"no checkpoint {name!r} in {path.parent}; there are: {', '.join(known) or 'none'}"
        ) from None
    except CorruptState as error:
        raise CheckpointError(f"checkpoint {name!r} is damaged: {error.message}") from error


def checkpoint_checksum(directory: Path, name: str) -> int:
    """CRC32C of the file of a checkpoint's snapshot: tells checkpoints of one name apart."""
    return int(google_crc32c.value(snapshot_path(_path(directory, name), NUMBER).read_bytes()))


def checkpoint_segments(directory: Path) -> set[int]:
    """Numbers of the segments that checkpoints keep, whoever made these."""
    folder = directory / FOLDER
    entries = folder.iterdir() if folder.is_dir() else ()
    return {number for entry in entries if entry.is_dir() for number in list_segments(entry)}


def verify_checkpoint(directory: Path, name: str) -> list[str]:
    """Check every checksum; returns what is wrong, in sentences.

    Raises:
        CheckpointError, StateError: as :func:`read_checkpoint`.
    """
    path, problems = _path(directory, name), []
    segments: dict[int, Segment] = {}
    for place in _places(read_checkpoint(directory, name)):
        try:
            if place.segment not in segments:
                segments[place.segment] = Segment(path, place.segment)
            segments[place.segment].frame(place)
        except FileNotFoundError:
            problems.append(f"{segment_path(path, place.segment).name} is missing")
        except StateError as error:
            problems.append(error.message)
    return list(dict.fromkeys(problems))


def _places(data: dict[str, Any]) -> Iterator[Place]:
    """Where the frames of a snapshot are."""
    ledger = data["ledger"]
    entries: list[Any] = [entry for state in ledger["sources"].values() for entry in state["ready"]]
    entries += [entry for batch in ledger["leases"] for _, groups in batch["shares"] for entry in groups]
    for entry in entries:
        yield Place(*entry[0]) if isinstance(entry[0], list) else Place(*entry)
    for state in ledger["sources"].values():
        for launched in state["in_flight"]:
            yield from (Place(*place) for place in launched[5])


def relink(directory: Path, name: str, data: dict[str, Any], *, end: int) -> None:
    """Put a checkpoint's segments back into the state directory.

    Args:
        directory: of the state.
        name: of the checkpoint.
        data: its snapshot.
        end: number of the segment that is being written: one that is not there is of the log, from here on.

    Raises:
        CheckpointError: its segments have the numbers of others, that are there or to come: it is of another state.
        OSError: the disk failed.
    """
    for number in sorted(kept_by(data).frames):
        mine, theirs = segment_path(directory, number), segment_path(_path(directory, name), number)
        if not (mine.samefile(theirs) if mine.exists() else number < end):
            raise CheckpointError(
                f"checkpoint {name!r} belongs to another state: {mine} is not its segment {number}. To load it, stop"
                " the daemon, and start it with a run.state_dir that contains only the folder with the checkpoints"
            )
        with suppress(FileExistsError):
            os.link(theirs, mine)
    _sync(directory)
