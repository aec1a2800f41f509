"""Snapshots: small JSON index files; frames are named by their places in the log and never copied.

Layout of a file: one line ``ROLSNAP 1 <crc32c, 8 hex digits> <length in bytes>``, then the JSON text.

Invariants:

* A snapshot is whole or it is not there: written to a temporary name, synced, renamed, directory synced.
* The two newest are kept, so that a damaged one can be stepped over.
* A snapshot is written only after the records it refers to are synced.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Final

import aiofiles
import aiofiles.os
import google_crc32c
import orjson

from orchestrator.errors import CorruptState

from .writer import sync_directory

__all__ = ["KEPT_SNAPSHOTS", "list_snapshots", "read_snapshot", "snapshot_path", "write_snapshot"]

KEPT_SNAPSHOTS: Final = 2
MAGIC: Final = b"ROLSNAP"
FORMAT: Final = 1
_NAME = re.compile(r"snapshot-(\d{8})\.json")


def snapshot_path(directory: Path, number: int) -> Path:
    """The file of a snapshot."""
    return directory / f"snapshot-{number:08d}.json"


def list_snapshots(directory: Path) -> list[int]:
    """Numbers of the snapshots in a directory, newest first."""
    return sorted((int(m[1]) for name in os.listdir(directory) if (m := _NAME.fullmatch(name))), reverse=True)


def read_snapshot(directory: Path, number: int) -> dict[str, Any]:
    """The JSON object of a snapshot.

    Raises:
        CorruptState: damaged, or of a format that this version does not read.
    """
    path = snapshot_path(directory, number)
    head, _, body = path.read_bytes().partition(b"\n")
    fields = head.split(b" ")
    if len(fields) != 4 or fields[0] != MAGIC:
        raise CorruptState(f"{path} is not a snapshot")
    if fields[1] != b"%d" % FORMAT:
        raise CorruptState(f"{path} is of format {fields[1].decode(errors='replace')}, this version reads {FORMAT}")
    if fields[2] != b"%08x" % google_crc32c.value(body) or fields[3] != b"%d" % len(body):
        raise CorruptState(f"{path} fails its checksum")
    value: dict[str, Any] = orjson.loads(body)
    return value


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


async def write_snapshot(directory: Path, number: int, data: bytes) -> None:
    """Write the JSON text ``data`` as snapshot ``number`` and remove those that are no longer kept.

    Raises:
        OSError: the disk failed; older snapshots are untouched.
    """
    temporary = directory / f"snapshot-{number:08d}.tmp"
    async with aiofiles.open(temporary, "wb", opener=_private) as file:
        await file.write(b"%b %d %08x %d\n" % (MAGIC, FORMAT, google_crc32c.value(data), len(data)))
        await file.write(data)
        await file.flush()
        await aiofiles.os.wrap(os.fsync)(file.fileno())
    await aiofiles.os.replace(temporary, snapshot_path(directory, number))
    await sync_directory(directory)
    for old in list_snapshots(directory)[KEPT_SNAPSHOTS:]:
        await aiofiles.os.unlink(snapshot_path(directory, old))
