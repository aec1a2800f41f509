"""Prompts in a Parquet file.

Invariants:

* pyarrow is imported when the first Parquet file is opened, so that it stays an optional dependency.
* Only the columns that a prompt takes are read; they stay in memory as Arrow arrays, and the file is not needed again.
* Every row is checked when the file is opened.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import Field

from orchestrator.errors import PromptFileError

from .files import FileSpec
from .rows import BadRow, Row, RowKeys

__all__ = ["ParquetRows", "ParquetSpec"]

MAX_PROBLEMS: Final = 20
"""Bad rows that one error names: enough to see the pattern, few enough to read."""

BATCH_ROWS: Final = 4096
"""Rows that are turned into Python objects at a time while they are checked."""


class ParquetRows:
    """The rows of one file; see ``files.Rows``.

    Raises:
        PromptFileError: pyarrow is not installed, the file is not Parquet, a column is missing, or rows are not
            prompts; up to ``MAX_PROBLEMS`` are named by their number from 0.
        OSError: the file cannot be opened or read.
    """

    def __init__(self, path: Path, keys: RowKeys) -> None:
        self._keys = keys
        self._table = _read_columns(path, keys)
        if not self._table.num_rows:
            raise PromptFileError(f"{path}: the file has no rows")
        problems: list[str] = []
        for row, value in enumerate(self._values()):
            try:
                keys.parse(value)
            except BadRow as error:
                problems.append(f"{path}: row {row}: {error}")
                if len(problems) == MAX_PROBLEMS:
                    problems.append(f"{path}: stopped reading after {MAX_PROBLEMS} bad rows")
                    break
        if problems:
            raise PromptFileError("\n".join(problems))

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def read(self, row: int) -> Row:
        """Turn one row into Python objects."""
        return self._keys.parse({name: self._table.column(name)[row].as_py() for name in self._table.column_names})

    def _values(self) -> Iterator[dict[str, Any]]:
        for batch in self._table.to_batches(max_chunksize=BATCH_ROWS):
            yield from batch.to_pylist()


def _read_columns(path: Path, keys: RowKeys) -> Any:
    """The columns that ``keys`` names, as a ``pyarrow.Table``."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise PromptFileError(
            f"{path}: reading Parquet needs pyarrow: pip install 'rollout-orchestrator[prompts]'"
        ) from None
    try:
        with pq.ParquetFile(path) as file:
            there = dict.fromkeys(file.schema_arrow.names)
            keys.check_keys(there)
            wanted = dict.fromkeys((*keys.required, *(key for key in keys.optional if key in there)))
            return file.read(columns=list(wanted))
    except pa.ArrowException as error:
        raise PromptFileError(f"{path}: not a Parquet file that pyarrow can read: {error}") from error
    except BadRow as error:
        raise PromptFileError(f"{path}: {error}") from None


class ParquetSpec(FileSpec):
    """Prompts in a Parquet file."""

    suffix = ".parquet"
    reader = ParquetRows
    has_json_text = True

    kind: Literal["parquet"] = Field(
        "parquet", description="parquet: a Parquet file; the default if path ends in .parquet."
    )
