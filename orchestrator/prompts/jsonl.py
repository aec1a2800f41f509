"""Prompts in a file of JSON lines.

Invariants:

* Opening reads every line once and keeps 16 bytes a row: where its line begins, how long it is, and its
  CRC-32. Rows are parsed when read.
* A row that is read later is the row that was checked: the file stays open, so that a file renamed over it changes
  nothing, and a row whose bytes have changed is an error, not another prompt.
* Rows are read with ``pread``, not through a memory map: touching a map of a file that somebody truncated ends the
  whole process by SIGBUS.
* Blank lines are skipped, but counted in line numbers; a byte order mark at the beginning is skipped.
"""

from __future__ import annotations

import os
import weakref
import zlib
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal

import orjson
from pydantic import Field

from orchestrator.errors import PromptFileError

from .files import FileSpec
from .rows import BadRow, Row, RowKeys

__all__ = ["MAX_LINE_BYTES", "JsonlRows", "JsonlSpec"]

MAX_LINE_BYTES: Final = 16 << 20
"""16 MiB: 4 million tokens of text in one prompt; a file without newlines must not fill the memory."""

MAX_PROBLEMS: Final = 20
"""Bad lines that one error names: enough to see the pattern, few enough to read."""

BUFFER_BYTES: Final = 1 << 20
"""1 MiB: reads ahead while the lines are checked."""

BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"


class JsonlRows:
    """The rows of one file; see ``files.Rows``.

    Raises:
        PromptFileError: no line is a prompt, or some are not; up to ``MAX_PROBLEMS`` are named.
        OSError: the file cannot be opened or read.
    """

    def __init__(self, path: Path, keys: RowKeys) -> None:
        self._path = path
        self._keys = keys
        self._begins = array("Q")  # [n] first byte of the line
        self._lengths = array("I")  # [n] bytes of the line, newline included
        self._checksums = array("I")  # [n] CRC-32 of the line, newline included
        with path.open("rb", buffering=BUFFER_BYTES) as file:
            self._index(file)
            self._fd = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._fd)

    def __len__(self) -> int:
        return len(self._checksums)

    def read(self, row: int) -> Row:
        """Parse one row again.

        Raises:
            PromptFileError: its bytes are not those that were there when the file was opened.
        """
        begin = self._begins[row]
        line = os.pread(self._fd, self._lengths[row], begin)
        if zlib.crc32(line) != self._checksums[row]:
            raise PromptFileError(
                f"{self._path}: row {row} (at byte {begin}) has changed since the file was opened; "
                "do not change a file that is in use: write a new file and rename it over the old one"
            )
        return self._keys.parse(orjson.loads(line))

    def _index(self, file: BinaryIO) -> None:
        """Check every line and note where the rows begin."""
        problems: list[str] = []
        for number, begin, line in _lines(file):
            try:
                self._keys.parse(_parse_line(line))
            except BadRow as error:
                problems.append(f"{self._path}:{number}: {error}")
                if len(problems) == MAX_PROBLEMS:
                    problems.append(f"{self._path}: stopped reading after {MAX_PROBLEMS} bad lines")
                    break
            self._begins.append(begin)
            self._lengths.append(len(line))
            self._checksums.append(zlib.crc32(line))
        if problems:
            raise PromptFileError("\n".join(problems))
        if not self._checksums:
            raise PromptFileError(f"{self._path}: the file is empty; expected one JSON object per line")


def _lines(file: BinaryIO) -> Iterator[tuple[int, int, bytes]]:
    """Line number from 1, first byte, and text of every line that is not blank.

    A line above ``MAX_LINE_BYTES`` is cut off a little above it; first bytes are not right any more after it, which
    does not matter, because the file is refused.
    """
    begin = len(BYTE_ORDER_MARK) if file.peek(3)[:3] == BYTE_ORDER_MARK else 0  # type: ignore[attr-defined]
    file.seek(begin)
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 2):
        number += 1
        rest = line
        while len(rest) > MAX_LINE_BYTES and not rest.endswith(b"\n"):
            rest = file.readline(MAX_LINE_BYTES + 2)
        if len(line) > MAX_LINE_BYTES or not line.isspace():
            yield number, begin, line
        begin += len(line)


def _parse_line(line: bytes) -> Any:
    if len(line.rstrip()) > MAX_LINE_BYTES:
        raise BadRow(f"the line is longer than {MAX_LINE_BYTES} bytes")
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise BadRow(f"not JSON: {error}") from None


class JsonlSpec(FileSpec):
    """Prompts in a file of JSON lines."""

    suffix = ".jsonl"
    reader = JsonlRows

    kind: Literal["jsonl"] = Field(
        "jsonl", description="jsonl: a file of JSON lines; the default if path ends in .jsonl."
    )
