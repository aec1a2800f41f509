"""One batch to one file.

Invariants:

* The file is there whole or not at all: written under another name, synced, renamed, directory synced. A batch whose
  file is there already is not written again: what was synced before cannot differ.
* Everything here blocks: call it in a worker thread. No call holds Python's lock for longer than one group takes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Final

import orjson

from orchestrator.core.ledger.unarchived import TrainedBatch
from orchestrator.errors import FrameError
from orchestrator.frames import GroupFrame

from .names import UNFINISHED, step_path
from .rows import group_object

__all__ = ["Written", "write_batch"]

_JSON_OPTIONS: Final = orjson.OPT_APPEND_NEWLINE | orjson.OPT_NON_STR_KEYS

Written = dict[int, str]
"""Groups that could not be written, because their frames cannot be read back, and why."""


def write_batch(directory: Path, batch: TrainedBatch, format_: str) -> Written:
    """Write a batch's file, unless it is there; which of its groups are missing in it, and why.

    Raises:
        OSError: the disk failed; nothing is left of the file.
    """
    path = step_path(directory, batch.key.step, batch.key.history, format_)
    lost: Written = {}
    if path.exists():
        return lost
    directory.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + UNFINISHED)
    try:
        with unfinished.open("wb") as file:
            rows = _rows(batch, lost, with_tokens=format_ == "parquet")
            (_write_parquet if format_ == "parquet" else _write_lines)(file, rows)
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(path)
        _sync_directory(directory)
    except OSError:
        with suppress(OSError):
            unfinished.unlink()
        raise
    return lost


def _rows(batch: TrainedBatch, lost: Written, *, with_tokens: bool) -> Iterator[dict[str, Any]]:
    for index, group in sorted(batch.groups.items()):
        try:
            if group.damage is not None:
                raise FrameError(group.damage)
            yield group_object(batch, GroupFrame(group.frame), with_tokens=with_tokens)
        except (FrameError, KeyError, TypeError) as error:
            lost[index] = str(error)


def _write_lines(file: BinaryIO, rows: Iterator[dict[str, Any]]) -> None:
    for row in rows:
        file.write(orjson.dumps(row, option=_JSON_OPTIONS))


def _write_parquet(file: BinaryIO, rows: Iterator[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from .parquet import SCHEMA, as_record

    batches = [pa.RecordBatch.from_pylist([as_record(row)], schema=SCHEMA) for row in rows]
    pq.write_table(pa.Table.from_batches(batches, schema=SCHEMA).combine_chunks(), file, compression="zstd")


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
