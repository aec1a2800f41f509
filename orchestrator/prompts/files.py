"""Prompt sources that are files: opened once, checked wholly, read by row.

Invariants:

* A file that opens has no bad row; a file with bad rows does not open, and the error names them.
* File work that may take long happens in :func:`load_prompts`, which ``open_prompts`` runs in a worker thread;
  reading one row afterwards takes microseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

from orchestrator.errors import PromptFileError
from orchestrator.records import Prompt

from .jsonl import JsonlRows
from .order import PromptOrder
from .parquet import ParquetRows
from .port import PromptSource
from .rows import DEFAULT_INPUT_KEY, Row, RowKeys

__all__ = ["PromptFile", "Rows", "load_prompts"]


class Rows(Protocol):
    """One format's way to the rows of a file."""

    def __len__(self) -> int:
        """Number of rows, at least 1."""
        ...

    def read(self, row: int) -> Row:
        """The row of that number, from 0."""
        ...


FORMATS: Final[dict[str, tuple[Callable[[Path, RowKeys], Rows], bool]]] = {
    ".jsonl": (JsonlRows, False),
    ".parquet": (ParquetRows, True),
}
"""By suffix: the reader, and whether metadata may be a string of JSON."""


class PromptFile:
    """A :class:`~orchestrator.prompts.port.PromptSource` over the rows of one file."""

    def __init__(self, name: str, rows: Rows, order: PromptOrder, epochs: int | None) -> None:
        self._name = name
        self._rows = rows
        self._order = order
        self._epochs = epochs

    @property
    def name(self) -> str:
        """The source's name."""
        return self._name

    @property
    def epochs(self) -> int | None:
        """How often the prompts are gone through; ``None``: for ever."""
        return self._epochs

    def __len__(self) -> int:
        return len(self._rows)

    def row_at(self, epoch: int, position: int) -> int:
        """The row that stands at ``position`` of the order of ``epoch`` (see ``order.py``)."""
        return self._order.row_at(epoch, position)

    async def read(self, prompt_index: int, epoch: int) -> Prompt:
        """The prompt of that row; microseconds, so that it does not leave the loop.

        Raises:
            IndexError: there is no such row.
            PromptFileError: the file has changed since it was opened.
        """
        if not 0 <= prompt_index < len(self._rows):
            raise IndexError(f"source {self._name} has no row {prompt_index}, only 0 to {len(self._rows) - 1}")
        row = self._rows.read(prompt_index)
        return Prompt(
            source=self._name,
            prompt_index=prompt_index,
            epoch=epoch,
            content=row.content,
            label=row.label,
            metadata=row.metadata,
            tokens=row.tokens,
            max_new_tokens=row.max_new_tokens,
        )

    async def aclose(self) -> None:
        """The file is let go of with the last who reads it."""


def load_prompts(
    *,
    name: str,
    path: Path,
    input_key: str = DEFAULT_INPUT_KEY,
    label_key: str | None = None,
    metadata_key: str | None = None,
    max_new_tokens_key: str | None = None,
    shuffle: bool = True,
    epochs: int | None = None,
    seed: int = 0,
) -> PromptSource:
    """Open and check a file of prompts; blocks for as long as reading the file takes.

    Args:
        name: the source's name; part of what its order is a function of.
        path: a file whose suffix tells its format: JSON lines (``.jsonl``) or Parquet (``.parquet``).
        input_key: where a row has its prompt: a text, a list of chat messages, or a list of token ids.
        label_key: where a row has its label, any JSON; named, it must be in every row. ``None``: ``label``, where
            a row has it.
        metadata_key: the same for an object of metadata. ``None``: ``metadata``, where a row has it.
        max_new_tokens_key: where every row has the bound of its responses, in tokens; ``None``: rows have none.
        shuffle: a new order in every epoch; ``False``: the order of the file.
        epochs: how often the prompts are gone through, 1 or more; ``None``: for ever.
        seed: the run's seed, 0 or more.

    Raises:
        PromptFileError: the file cannot be used; the message names each bad line or row, up to 20.
        ValueError: ``epochs`` or ``seed`` out of range.
    """
    if epochs is not None and epochs < 1:
        raise ValueError(f"epochs is {epochs}, it has to be 1 or more (or null: for ever)")
    try:
        reader, json_text = FORMATS[path.suffix.lower()]
    except KeyError:
        raise PromptFileError(
            f"{path}: the suffix {path.suffix!r} tells no known format; known are {', '.join(FORMATS)}"
        ) from None
    try:
        rows = reader(path, RowKeys(input_key, label_key, metadata_key, json_text, max_new_tokens_key))
    except OSError as error:
        raise PromptFileError(f"{path}: cannot be read: {error.strerror or error}") from error
    return PromptFile(name, rows, PromptOrder(seed=seed, name=name, rows=len(rows), shuffle=shuffle), epochs)
