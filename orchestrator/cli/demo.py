"""``orchestrator demo``: a first run that learns, with a daemon, a llama.cpp server and a trainer.

Invariants:

* Everything is written to a folder of its own, which is removed unless ``--keep`` names it, and to one picture.
* However the command is told to end, by the keyboard, SIGTERM or a terminal that is closed, what it started ends first.
* Exit code 0 says that the runs are finished, not that they learned: the tables say that.
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
"""Seeds of ``--compare``, unless said otherwise."""

LINE_EVERY = 25
"""Steps from line to line, where there is no terminal to draw on."""


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
    """Train a tiny policy from nothing, on this machine, and draw what it learned.

    A daemon with its own llama.cpp server and a trainer run as processes of
    their own; killed, they are started again and go on.

    Parameters
    ----------
    schedule
        The mixture: `curriculum` (the hard source when the easy one is learned), `mix` (both alike), `hard-only`.
    steps
        Batches to train on.
    seeds
        How many runs of each schedule, one after the other (1; 3 with --compare).
    first_seed
        Seed of the first run; the next ones count up.
    compare
        All three schedules, drawn together.
    keep
        A folder for state, logs and parameters, which stays. Given again, unfinished runs go on.
    picture
        Where the picture is written, a PNG file.
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
        with _told_to_end(), _folder(keep) as folder:
            runs = [_watch(folder / f"{name}-{seed}", name, seed, steps, http, console) for name, seed in wanted]
    except KeyboardInterrupt:
        console.print("Interrupted." + (f" With --keep {keep} again it goes on." if keep else ""))
        return FAILED
    _conclude(runs, steps, picture, console)
    if keep is not None:
        console.print(f"Everything else is in {keep}", soft_wrap=True)
    return OK


def _picture_problem(picture: Path) -> str | None:
    """Why it cannot be written, if that is so: to be said before the runs and not after them."""
    if picture.suffix.lower() != ".png":
        return f"{picture}: the picture is a PNG file; write --picture {picture.with_suffix('.png').name}"
    if not os.access(picture.parent, os.W_OK):
        return f"{picture}: nothing can be written in that folder; name another one with --picture"
    return None


@contextmanager
def _told_to_end() -> Iterator[None]:
    """SIGTERM and SIGHUP are like an interrupt from the keyboard: processes are ended and folders removed."""

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
    """One run with its display: live on a terminal, a line every now and then elsewhere."""
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

    told = 0

    def show(moment: Moment) -> None:
        nonlocal told
        if len(moment.run.steps) // LINE_EVERY > told:
            told = len(moment.run.steps) // LINE_EVERY
            rewards = ((name, moment.run.rewards(name).last) for name in moment.run.sources)
            seen = ", ".join(f"{name} {reward:.2f}" for name, reward in rewards if reward is not None)
            console.print(f"{headline(moment)}; reward: {seen}", soft_wrap=True)

    return show


def _conclude(runs: list[Run], steps: int, picture: Path, console: Console) -> None:
    """Draw all runs, by schedule; several are compared in a table as well."""
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
    console.print(f"The picture of it is {picture}", soft_wrap=True)
