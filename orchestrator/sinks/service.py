"""What the process of a sink does: opens the package's run, gives it the steps, ends it.

Invariants:

* An answer is ``{}`` or ``{"error": text}``, whatever the package does, as long as its process lives.
* What a package prints is discarded: the daemon's output is for log lines.
* A package continues the same run after restarts of this process and of the daemon: its identity is kept in a file.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Protocol

from orchestrator.concurrency.processes import ServiceRefused
from orchestrator.core.dotted import resolve

__all__ = ["PackageRun", "RunIdentity", "serve"]

RUNS: Final = {
    "tensorboard": "orchestrator.sinks.runs.tensorboard_run.open_run",
    "wandb": "orchestrator.sinks.runs.wandb_run.open_run",
    "mlflow": "orchestrator.sinks.runs.mlflow_run.open_run",
    "trackio": "orchestrator.sinks.runs.trackio_run.open_run",
}
"""By kind of sink: the function that imports the package and opens its run."""

MAX_ERROR_CHARACTERS: Final = 500


class PackageRun(Protocol):
    """One run of a package."""

    def log(self, step: dict[str, Any]) -> None:
        """Give it a step: ``step``, ``policy_version``, ``time``, ``metrics``."""
        ...

    def flush(self) -> None:
        """Make the steps so far survive the end of this process, where the package can."""
        ...

    def finish(self) -> None:
        """End the run cleanly."""
        ...


class RunIdentity:
    """An identifier kept in a file, by which a run is found again; the directory is created if missing."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> str | None:
        """The identifier, if there is one."""
        try:
            return self._path.read_text(encoding="utf-8").strip() or None
        except FileNotFoundError:
            return None

    def write(self, word: str) -> str:
        """Keep it."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self._path.with_suffix(".unfinished")
        unfinished.write_text(word + "\n", encoding="utf-8")
        unfinished.rename(self._path)
        return word


def serve(options: dict[str, Any]) -> Callable[[dict[str, Any], bytes], dict[str, Any]]:
    """The service of one sink.

    Args:
        options: ``kind``, ``run`` (the run's name), ``identity`` (path of the file), and those of the config.

    Raises:
        ServiceRefused: the run cannot be opened.
    """
    kind = options["kind"]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            run: PackageRun = resolve(RUNS[kind])(options, RunIdentity(Path(options["identity"])))
    except Exception as error:  # whatever the package raises is what the user has to know
        raise ServiceRefused(f"{kind}: {_words(error)}") from error

    def call(header: dict[str, Any], _: bytes) -> dict[str, Any]:
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                for step in header.get("steps", ()):
                    run.log(step)
                (run.finish if header.get("finish") else run.flush)()
        except Exception as error:  # noqa: BLE001 - whatever the package raises becomes the answer
            return {"error": f"{kind}: {_words(error)}"}
        return {}

    return call


def _words(error: Exception) -> str:
    text = " ".join(str(error).split())[:MAX_ERROR_CHARACTERS]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
