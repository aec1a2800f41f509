"""Snapshots: small JSON index files; frames are named by their places in the log and never copied.

Layout of a file: one line ``ROLSNAP <format> <crc32c, 8 hex digits> <length in bytes>``, then the JSON text.

Invariants:

* A snapshot is whole or it is not there: written to a temporary name, synced, renamed, directory synced. Its number is
  never given to another one while the daemon runs.
* The two newest are kept, so that a damaged one can be stepped over.
* A snapshot is written only after the records it refers to are synced.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

import aiofiles.os
import google_crc32c
import orjson

from orchestrator.errors import CorruptState, StateError

from .appender import sync_directory

__all__ = [
    "KEPT_SNAPSHOTS",
    "Kept",
    "kept_by",
    "list_snapshots",
    "list_unfinished",
    "read_snapshot",
    "remove_old_snapshots",
    "snapshot_head",
    "snapshot_path",
    "write_snapshot",
]

KEPT_SNAPSHOTS: Final = 2
MAGIC: Final = b"ROLSNAP"
FORMAT: Final = 2
READABLE_FORMATS: Final = (1, 2)
"""2 says of each frame whose it is, so that one that is damaged costs its own group alone."""

_NAME = re.compile(r"snapshot-(\d{8})\.json")
_UNFINISHED = re.compile(r"snapshot-\d{8}\.tmp")


class Kept(NamedTuple):
    """What a snapshot needs of the log: its frames' segments, and every segment from ``replayed_from`` on."""

    replayed_from: int
    frames: frozenset[int]


def kept_by(data: dict[str, Any]) -> Kept:
    """What the snapshot with this JSON object needs."""
    ledger = data["ledger"]
    states = ledger["sources"].values()
    groups = [entry for state in states for entry in state["ready"]]
    groups += [entry for batch in ledger["leases"] for _, entries in batch["shares"] for entry in entries]
    groups += [entry for batch in ledger.get("unarchived", ()) for entry in batch["groups"]]
    # in format 1 an entry is a place alone
    frames = {entry[0] if isinstance(entry[0], int) else entry[0][0] for entry in groups}
    frames |= {place[0] for state in states for launched in state["in_flight"] for place in launched[5]}
    return Kept(data["position"][0], frozenset(frames))


def snapshot_path(directory: Path, number: int) -> Path:
    """The file of a snapshot."""
    return directory / f"snapshot-{number:08d}.json"


def list_snapshots(directory: Path) -> list[int]:
    """Numbers of the snapshots in a directory, newest first."""
    return sorted((int(m[1]) for name in os.listdir(directory) if (m := _NAME.fullmatch(name))), reverse=True)


def list_unfinished(directory: Path) -> list[Path]:
    """Temporary files that a crash left behind."""
    return [directory / name for name in os.listdir(directory) if _UNFINISHED.fullmatch(name)]


def read_snapshot(directory: Path, number: int) -> dict[str, Any]:
    """The JSON object of a snapshot.

    Raises:
        CorruptState: damaged.
        StateError: of a format that this version does not read.
    """
    path = snapshot_path(directory, number)
    head, _, body = path.read_bytes().partition(b"\n")
    fields = head.split(b" ")
    if len(fields) != 4 or fields[0] != MAGIC or not fields[1].isdigit():
        raise CorruptState(f"{path.name} is not a snapshot")
    if int(fields[1]) not in READABLE_FORMATS:
        raise StateError(
            f"{path} is of format {int(fields[1])}, this version reads formats up to {FORMAT}: start the version that"
            " wrote it, or begin anew in another run.state_dir"
        )
    if fields[2] != b"%08x" % google_crc32c.value(body) or fields[3] != b"%d" % len(body):
        raise CorruptState(f"{path.name} fails its checksum")
    value: dict[str, Any] = orjson.loads(body)
    return value


def snapshot_head(data: bytes) -> bytes:
    """The first line of the file that holds the JSON text ``data``."""
    return b"%b %d %08x %d\n" % (MAGIC, FORMAT, google_crc32c.value(data), len(data))


@aiofiles.os.wrap
def _write_file(path: Path, head: bytes, data: bytes) -> None:
    """In one call: a cancelled one goes on to its end in its thread, and leaves no open file behind."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(head)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


async def write_snapshot(directory: Path, number: int, data: bytes) -> None:
    """Write the JSON text ``data`` as snapshot ``number``.

    No number may be used twice: a call that was cancelled may still be at work in its thread.

    Raises:
        OSError: the disk failed; older snapshots are untouched.
    """
    temporary = directory / f"snapshot-{number:08d}.tmp"
    try:
        await _write_file(temporary, snapshot_head(data), data)
        await aiofiles.os.replace(temporary, snapshot_path(directory, number))
        await sync_directory(directory)
    except OSError:
        with suppress(OSError):  # gone already, or the disk is no better: the next start removes it
            await aiofiles.os.unlink(temporary)
        raise


async def remove_old_snapshots(directory: Path) -> None:
    """Remove the snapshots that are no longer kept.

    Raises:
        OSError: the disk failed.
    """
    for number in (await aiofiles.os.wrap(list_snapshots)(directory))[KEPT_SNAPSHOTS:]:
        await aiofiles.os.unlink(snapshot_path(directory, number))
