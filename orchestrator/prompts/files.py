"""Prompt sources that are files: opened once, checked wholly, read by row.

Invariants:

* A file that opens has no bad row; a file with bad rows does not open, and the error names them.
* File work that may take long happens in :meth:`FileSpec.load`, which :meth:`FileSpec.open` runs in a worker thread;
  reading one row afterwards takes microseconds.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar, Protocol

import anyio.to_thread
from pydantic import Field

from orchestrator.errors import PromptFileError
from orchestrator.records import Prompt
from orchestrator.schema.fields import FilePath

from .order import PromptOrder
from .port import PromptSource
from .rows import DEFAULT_INPUT_KEY, Row, RowKeys
from .spec import PromptSpec

__all__ = ["FileSpec", "PromptFile", "Rows"]


class Rows(Protocol):
    """One format's way to the rows of a file; made with the file and the keys of its rows."""

    def __init__(self, path: Path, keys: RowKeys) -> None: ...

    def __len__(self) -> int:
        """Number of rows, at least 1."""
        ...

    def read(self, row: int) -> Row:
        """The row of that number, from 0."""
        ...


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
            raise IndexError(f"source {self._name} has no row {prompt_index}, only rows 0 to {len(self._rows) - 1}")
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


class FileSpec(PromptSpec):
    """Prompts that are rows of a file; the base of the kinds that are formats of files."""

    known_as = "files"

    suffix: ClassVar[str]
    """The end of the file names that say their kind by themselves."""

    reader: ClassVar[type[Rows]]
    """Opens the file and checks every row."""

    has_json_text: ClassVar[bool] = False
    """Whether metadata may be a text of JSON."""

    path: FilePath = Field(description="File of prompts. Relative to the config file.")
    input_key: Annotated[str, Field(min_length=1)] = Field(
        DEFAULT_INPUT_KEY, description="Key of the prompt in a row: text, chat messages, or token ids."
    )
    label_key: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="Key of the label in a row; null: label, if a row has it."
    )
    metadata_key: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="Key of the metadata object in a row; null: metadata, if a row has it."
    )
    max_new_tokens_key: Annotated[str, Field(min_length=1)] | None = Field(
        None,
        description="Key of a row that holds the longest response to it in tokens, where that is less than "
        "sampling.max_new_tokens; null: rows have none.",
    )

    @classmethod
    def claims(cls, path: str) -> bool:
        """By the suffix, in any case."""
        return Path(path).suffix.lower() == cls.suffix

    @property
    def file(self) -> Path:
        """The file."""
        return self.path

    async def open(self, *, name: str, seed: int) -> PromptSource:
        """As :meth:`load`, in a worker thread."""
        return await anyio.to_thread.run_sync(partial(self.load, name=name, seed=seed))

    def load(self, *, name: str, seed: int = 0) -> PromptSource:
        """Open and check the file; blocks for as long as reading it takes.

        Args:
            name: the source's name; part of what its order is a function of.
            seed: the run's seed, 0 or more.

        Raises:
            PromptFileError: the file cannot be used; the message names each bad line or row, up to 20.
        """
        keys = RowKeys(self.input_key, self.label_key, self.metadata_key, self.has_json_text, self.max_new_tokens_key)
        try:
            rows = self.reader(self.path, keys)
        except OSError as error:
            raise PromptFileError(f"cannot read {self.path}: {error.strerror or error}") from error
        order = PromptOrder(seed=seed, name=name, rows=len(rows), shuffle=self.shuffle)
        return PromptFile(name, rows, order, self.epochs)
