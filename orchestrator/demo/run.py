"""One run of the demo: the first parameters, then daemon and trainer side by side until the trainer has finished.

Invariants:

* The trainer is like any other trainer, a process that knows the socket. This module only starts and watches.
* A run whose folder is kept continues where it was: the daemon from its state, the trainer from what it saved.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from orchestrator.client import RolloutClient
from orchestrator.errors import OrchestratorError

from .keeper import DemoFailed, Keeper
from .progress import ProgressFile, Restart, Run
from .setup import Places, Schedule, example_module, working_directory, write_config

__all__ = ["Moment", "run"]

LOOK_EVERY_S: Final = 0.25
STATUS_TIMEOUT_S: Final = 0.5
INIT_DEADLINE_S: Final = 60.0

START_DEADLINE_S: Final = 120.0
"""For the first batch: making ready takes three seconds on a laptop."""

ONE_THREAD: Final = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
"""For the trainer: matrices of 64 × 64 gain nothing from a second thread, and the engine needs the other core."""


@dataclass(frozen=True, slots=True)
class Moment:
    """The state of a run at one moment.

    ``steps`` is the planned number. ``status`` is the daemon's, ``None`` while it does not answer. ``pids`` are those
    of the processes. ``http`` is the address of the live page, if it is on.
    """

    run: Run
    steps: int
    status: dict[str, Any] | None
    pids: dict[str, int]
    http: str | None = None


def run(
    folder: Path, *, schedule: Schedule, seed: int, steps: int, http: str | None, show: Callable[[Moment], None]
) -> Run:
    """Run to the end, continuing from what the folder has.

    Args:
        folder: of this run; made when missing.
        schedule: which weights.
        seed: of everything that is drawn.
        steps: number of batches.
        http: address of the status page; ``None``: off.
        show: called about four times a second.

    Raises:
        DemoFailed: daemon or trainer failed; the message quotes their last output.
        ConfigError: the config cannot be used, such as for a folder whose path is too long for a socket.
    """
    places = Places(folder)
    config = write_config(places, schedule=schedule, seed=seed, steps=steps, http=http)
    sources = tuple(source["name"] for source in config["data_sources"])
    progress, restarts = ProgressFile(places.progress), list[Restart]()
    began, elapsed = time.monotonic(), _elapsed(places)

    def so_far() -> Run:
        seconds = elapsed + time.monotonic() - began
        return Run(schedule, seed, sources, progress.read(), seconds, tuple(restarts))

    if len(progress.read()) < steps:
        _write_first_parameters(places, seed)
        with _daemon(places) as daemon, _trainer(places, seed) as trainer:
            keepers = (daemon, trainer)
            while not trainer.has_finished(LOOK_EVERY_S):
                if daemon.has_finished():
                    raise DemoFailed(f"the daemon exited before the trainer:\n{daemon.last_lines()}")
                restarts += _news(restarts, keepers, len(progress.read()))
                found = so_far()
                if not found.steps and time.monotonic() - began > START_DEADLINE_S:
                    raise DemoFailed(f"no batch arrived within {START_DEADLINE_S:g} s:\n{daemon.last_lines()}")
                show(Moment(found, steps, _status(places), {keeper.name: keeper.pid for keeper in keepers}, http))
    return so_far()


def _news(known: Sequence[Restart], keepers: Iterable[Keeper], step: int) -> list[Restart]:
    """The restarts since the last look."""
    counts = Counter(restart.name for restart in known)
    return [Restart(step, keeper.name) for keeper in keepers for _ in range(keeper.restarts - counts[keeper.name])]


def _elapsed(places: Places) -> float:
    """Seconds that an earlier, unfinished start of this run took."""
    steps = ProgressFile(places.progress).read()
    return steps[-1].time - steps[0].time if steps else 0.0


def _module(places: Places, *arguments: str) -> list[str]:
    return [sys.executable, "-m", example_module("trainer"), str(places.trainer), *arguments]


def _write_first_parameters(places: Places, seed: int) -> None:
    if places.model.exists():
        return
    try:
        subprocess.run(  # noqa: S603 - our own command
            _module(places, "--init", "--seed", str(seed)),
            check=True,
            capture_output=True,
            cwd=working_directory(),
            timeout=INIT_DEADLINE_S,
        )
    except subprocess.CalledProcessError as error:
        words = error.stderr.decode(errors="replace")
        raise DemoFailed(f"the trainer could not write its first parameters:\n{words}") from error


def _daemon(places: Places) -> Keeper:
    command = [sys.executable, "-m", "orchestrator", "run", str(places.config)]
    return Keeper("daemon", command, places.folder / "daemon.out", environment={}, directory=working_directory())


def _trainer(places: Places, seed: int) -> Keeper:
    command = _module(places, "--socket", str(places.socket), "--seed", str(seed))
    output = places.folder / "trainer.out"
    return Keeper("trainer", command, output, environment=ONE_THREAD, directory=working_directory())


def _status(places: Places) -> dict[str, Any] | None:
    """The daemon's status; ``None`` while it does not answer, such as during a restart."""
    client = RolloutClient(places.socket, client="demo", connect_timeout_s=STATUS_TIMEOUT_S)
    try:
        return client.status()
    except OrchestratorError:
        return None
    finally:
        client.close()
