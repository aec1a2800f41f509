"""``metrics.jsonl`` in the state directory: a line a step, for a notebook, a script, or the page after a restart.

A line is ``{"step", "policy_version", "time", "metrics": {slashed name: number}}``; ``time`` is in seconds since 1970.
Of several lines of one step (a checkpoint was loaded) the last one holds.

Invariants:

* At most ``max_bytes`` a file, and ``keep`` older ones beside it (``metrics.1.jsonl`` is the youngest of them).
* Lines are whole: if the file ends in half a line (a killed process, a full disk), that line is ended first.
* A worker thread does the writing; a disk that hangs delays nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

import anyio
import orjson

from .feed import SinkFailed, StepFigures, as_json

__all__ = ["METRICS_FILE", "MetricsFile", "read_steps"]

METRICS_FILE: Final = "metrics.jsonl"

WRITE_DEADLINE_S: Final = 20.0
"""After this time a disk counts as hanging; the thread keeps waiting for it."""

READ_BYTES: Final = 16 << 20
"""How much of each file is read at a restart: more than the page plots."""


class MetricsFile:
    """A :class:`~orchestrator.sinks.feed.StepSink`; see the module's invariants.

    Args:
        directory: where the files are; it exists.
        max_bytes: of one file.
        keep: older files.
    """

    def __init__(self, directory: Path, *, max_bytes: int, keep: int) -> None:
        self._path = directory / METRICS_FILE
        self._max_bytes = max_bytes
        self._keep = keep
        self._thread = anyio.CapacityLimiter(1)

    async def write(self, steps: Sequence[StepFigures]) -> None:
        """Append the steps.

        Raises:
            SinkFailed: the disk failed, or did not answer in time.
        """
        lines = b"".join(orjson.dumps(step, option=orjson.OPT_APPEND_NEWLINE) for step in as_json(steps))
        try:
            with anyio.fail_after(WRITE_DEADLINE_S):
                await anyio.to_thread.run_sync(
                    partial(self._append, lines), limiter=self._thread, abandon_on_cancel=True
                )
        except TimeoutError as error:
            raise SinkFailed(f"{self._path} was not written within {WRITE_DEADLINE_S:g} s: the disk hangs") from error
        except OSError as error:
            raise SinkFailed(f"cannot write {self._path}: {error.strerror or error}") from error

    async def finish(self) -> None:
        """Nothing is held back."""

    async def aclose(self) -> None:
        """Nothing is open."""

    def _append(self, lines: bytes) -> None:
        descriptor = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            if size and size + len(lines) > self._max_bytes:
                self._rotate()
                os.close(descriptor)
                descriptor = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            elif size and os.pread(descriptor, 1, size - 1) != b"\n":
                lines = b"\n" + lines
            rest = memoryview(lines)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        finally:
            os.close(descriptor)

    def _rotate(self) -> None:
        for number in range(self._keep, 0, -1):
            older = self._path if number == 1 else _rotated(self._path, number - 1)
            with suppress(FileNotFoundError):
                older.replace(_rotated(self._path, number))
        if not self._keep:
            self._path.unlink()


def _rotated(path: Path, number: int) -> Path:
    return path.with_name(f"{path.stem}.{number}{path.suffix}")


def read_steps(directory: Path, most: int) -> list[dict[str, Any]]:
    """At most ``most`` of the newest lines, oldest first; none if there is no file. Blocks.

    Damaged lines are left out.
    """
    path = directory / METRICS_FILE
    steps = list(_lines(path))
    if len(steps) < most:
        steps = [*_lines(_rotated(path, 1)), *steps]
    return steps[-most:]


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - READ_BYTES))
            text = file.read(READ_BYTES)
    except OSError:  # these figures are only for viewing: the run continues without them
        return
    for line in text.splitlines():
        with suppress(orjson.JSONDecodeError):
            value = orjson.loads(line)
            if isinstance(value, dict) and value.keys() >= {"step", "policy_version", "time", "metrics"}:
                yield value
