"""``orchestrator demo``: a first run that learns, with a daemon, a llama.cpp server and a trainer.

Invariants:

* It writes one plot, and everything else to a folder of its own, which is removed unless ``--keep`` names it.
* However the command is stopped (keyboard, SIGTERM, a closed terminal), the processes that it started end first.
* Exit code 0 says that the runs finished. Whether they learned is in the tables.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter, validators

from .exit_codes import FAILED, OK, USAGE

if TYPE_CHECKING:
    from rich.console import Console

    from orchestrator.demo.progress import Run
    from orchestrator.demo.run import Moment
    from orchestrator.demo.setup import Schedule

__all__ = ["demo"]

FRESH_SEEDS = 3
"""Default number of seeds of ``--compare``."""

LINE_EVERY = 25
"""Steps between two lines of output where there is no terminal."""


def demo(
    *,
    schedule: Literal["curriculum", "mix", "hard-only"] = "curriculum",
    steps: Annotated[int, Parameter(validator=validators.Number(gte=1, lte=100_000))] = 500,
    seeds: Annotated[int | None, Parameter(validator=validators.Number(gte=1, lte=100))] = None,
    first_seed: Annotated[int, Parameter(validator=validators.Number(gte=0, lte=1_000_000))] = 0,
    compare: Annotated[bool, Parameter(negative=())] = False,
    keep: Path | None = None,
    picture: Path = Path("demo.png"),
    http: str | None = None,
) -> int:
    """Train a tiny policy from scratch on this machine, and plot what it learned.

    The daemon, its llama.cpp server and a trainer run as separate processes.
    Kill any of them: it is restarted and the run continues.

    Parameters
    ----------
    schedule
        The mixture: `curriculum` (hard prompts once the easy ones are learned), `mix` (half and half), `hard-only`.
    steps
        Number of batches to train on.
    seeds
        Runs of each schedule, one after the other (default: 1, or 3 with --compare).
    first_seed
        Seed of the first run; later runs count up from it.
    compare
        Run all three schedules and plot them together.
    keep
        Keep state, logs and parameters in this folder. Give it again to continue unfinished runs.
    picture
        Where to write the plot (a PNG file).
    http
        Address of the daemon's live page, such as 127.0.0.1:8642.
    """
    from rich.console import Console

    from orchestrator.demo.setup import SCHEDULES

    if (problem := _picture_problem(picture)) is not None:
        print(f"orchestrator demo: {problem}", file=sys.stderr)
        return USAGE
    console = Console(highlight=False)
    count = seeds or (FRESH_SEEDS if compare else 1)
    wanted = [
        (n, seed) for n in (SCHEDULES if compare else [schedule]) for seed in range(first_seed, first_seed + count)
    ]
    try:
        with _signals_interrupt(), _folder(keep) as folder:
            runs = [_watch(folder / f"{name}-{seed}", name, seed, steps, http, console) for name, seed in wanted]
    except KeyboardInterrupt:
        console.print("Interrupted." + (f" To continue, run it again with --keep {keep}." if keep else ""))
        return FAILED
    _conclude(runs, steps, picture, console)
    if keep is not None:
        console.print(f"All other files are in {keep}", soft_wrap=True)
    return OK


def _picture_problem(picture: Path) -> str | None:
    """Why the plot cannot be written, if so: to be reported before the runs and not after them."""
    if picture.suffix.lower() != ".png":
        return f"{picture}: the plot is a PNG file; use --picture {picture.with_suffix('.png').name}"
    if not os.access(picture.parent, os.W_OK):
        return f"{picture}: this folder is not writable; choose another one with --picture"
    return None


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """SIGTERM and SIGHUP act like an interrupt from the keyboard: processes are stopped and folders removed."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="orchestrator-demo-") as name:
            yield Path(name)
    else:
        yield keep.resolve()


def _watch(folder: Path, schedule: Schedule, seed: int, steps: int, http: str | None, console: Console) -> Run:
    """One run with its display: live in a terminal, a line every :data:`LINE_EVERY` steps elsewhere."""
    from rich.live import Live

    from orchestrator.demo.display import live, summary
    from orchestrator.demo.run import run

    start = partial(run, folder, schedule=schedule, seed=seed, steps=steps, http=http)
    if console.is_terminal:
        with Live(console=console, refresh_per_second=4, transient=True) as screen:
            finished = start(show=lambda moment: screen.update(live(moment, console.width)))
    else:
        if http is not None:
            console.print(f"live page: http://{http}/")
        finished = start(show=_lines(console))
    console.print(summary(finished))
    return finished


def _lines(console: Console) -> Callable[[Moment], None]:
    from orchestrator.demo.display import headline

    printed = 0

    def show(moment: Moment) -> None:
        nonlocal printed
        if len(moment.run.steps) // LINE_EVERY > printed:
            printed = len(moment.run.steps) // LINE_EVERY
            rewards = ((name, moment.run.rewards(name).last) for name in moment.run.sources)
            seen = ", ".join(f"{name} {reward:.2f}" for name, reward in rewards if reward is not None)
            console.print(f"{headline(moment)}; reward: {seen}", soft_wrap=True)

    return show


def _conclude(runs: list[Run], steps: int, picture: Path, console: Console) -> None:
    """Plot all runs by schedule; several runs are also compared in a table."""
    from orchestrator.demo.display import comparison
    from orchestrator.demo.picture import Panel, draw

    panels = []
    for schedule in dict.fromkeys(run.schedule for run in runs):
        of = [run for run in runs if run.schedule == schedule]
        seeds = "seed " if len(of) == 1 else "seeds "
        panels.append(Panel(f"{schedule}, {seeds}{', '.join(str(run.seed) for run in of)}", of, steps))
    draw(panels, picture, title="A policy of 43,200 parameters learns to repeat digits")
    if len(runs) > 1:
        console.print(comparison(runs))
    console.print(f"The plot is {picture}", soft_wrap=True)
