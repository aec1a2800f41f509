"""The archive's Parquet files: one row a group, samples nested in it.

Invariants:

* What has no type of its own (label, metadata, sampling, a prompt of messages) is JSON text, and comes back as it was.
* pyarrow is imported with this module, and this module only where Parquet is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

__all__ = ["SCHEMA", "as_record", "iter_records"]

_JSON: Final = ("prompt", "label", "metadata", "sampling")

_SAMPLE: Final = pa.struct(
    [
        ("index", pa.int64()),
        ("status", pa.string()),
        ("reward", pa.float64()),
        ("finish_reason", pa.string()),
        ("tokens", pa.int64()),
        ("versions", pa.list_(pa.list_(pa.int64()))),
        ("oldest_version", pa.int64()),
        ("response", pa.string()),
        ("metadata", pa.string()),
        ("response_tokens", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float32())),
        ("loss_mask", pa.list_(pa.uint8())),
    ]
)

SCHEMA: Final = pa.schema(
    [
        ("step", pa.int64()),
        ("history", pa.string()),
        ("policy_version", pa.int64()),
        ("source", pa.string()),
        ("weight", pa.float64()),
        ("group_index", pa.int64()),
        ("prompt_index", pa.int64()),
        ("epoch", pa.int64()),
        ("prompt", pa.string()),
        ("label", pa.string()),
        ("metadata", pa.string()),
        ("sampling", pa.string()),
        ("prompt_tokens", pa.list_(pa.int32())),
        ("samples", pa.list_(_SAMPLE)),
    ],
    metadata={"json": ",".join(_JSON)},
)

_READ_WITHOUT: Final = ("response_tokens", "logprobs", "loss_mask")
"""Columns of a sample that are left out when it is read for people."""

READ_ROWS: Final = 8
"""Groups that are read at a time: as many as are kept in memory."""


def as_record(row: dict[str, Any]) -> dict[str, Any]:
    """A row as the schema has it."""
    texts = {key: _text(row[key]) for key in _JSON}
    return row | texts | {"samples": [sample | {"metadata": _text(sample["metadata"])} for sample in row["samples"]]}


def _text(value: Any) -> str:
    return orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS).decode()


def iter_records(path: Path) -> Iterator[dict[str, Any]]:
    """The groups of a file, as JSON lines have them. Blocks.

    Raises:
        OSError, ValueError: the file cannot be read.
    """
    with pq.ParquetFile(path) as file:
        leaves = (file.schema.column(i).path for i in range(len(file.schema.names)))
        wanted = [leaf for leaf in leaves if not any(f".{name}." in leaf for name in _READ_WITHOUT)]
        for batch in file.iter_batches(batch_size=READ_ROWS, columns=wanted):
            for row in batch.to_pylist():
                yield _from_record(row)


def _from_record(row: dict[str, Any]) -> dict[str, Any]:
    values = {key: orjson.loads(row[key]) for key in _JSON}
    samples = [sample | {"metadata": orjson.loads(sample["metadata"])} for sample in row["samples"]]
    return row | values | {"samples": samples}
