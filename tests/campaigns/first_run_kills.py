"""The first run, with a SIGKILL of daemon, engine and trainer in its middle: does the reward curve show a break?

As a program (``scripts/demo-kills``) it makes one whole run, draws it with the restarts marked, and compares: by how
much the reward falls from the ten steps before a kill to the ten after it, and by how much at most elsewhere in that
run, where nothing was killed. The tests make a short run.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from orchestrator.cli.exit_codes import FAILED, OK
from orchestrator.demo.display import headline
from orchestrator.demo.picture import Panel, draw
from orchestrator.demo.progress import Curve, Restart, Run
from orchestrator.demo.run import Moment, run

WINDOW = 10
"""Steps on either side of a kill: 120 groups, some 4 % of noise at a reward of one half."""

SMALL_FALL = 0.05
"""Less than that is noise, wherever it is."""

Victim = Callable[[Moment], int | None]
"""Whom to kill; ``None``: it is not there just now."""


def trainer(moment: Moment) -> int:
    return moment.pids["trainer"]


def daemon(moment: Moment) -> int:
    return moment.pids["daemon"]


def engine(moment: Moment) -> int | None:
    """The newest child of the daemon, which has two while it updates one, and none while it starts one."""
    pid = daemon(moment)
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(children[-1]) if children else None


def killing(at: dict[int, Victim], then: Callable[[Moment], None]) -> Callable[[Moment], None]:
    """Kill what each function names when the run has come to that step; ``then`` has a look as well."""
    left = dict(at)

    def show(moment: Moment) -> None:
        then(moment)
        for step in [step for step in left if len(moment.run.steps) >= step]:
            if (pid := left[step](moment)) is not None:
                os.kill(pid, signal.SIGKILL)
                del left[step]

    return show


# -- is there a break? -------------------------------------------------------------------------------------------------


def falls(curve: Curve) -> dict[int, float]:
    """By how much the mean of ``WINDOW`` values falls from those before each step to those from it on."""
    values = curve.values
    ends = range(WINDOW, len(values) - WINDOW + 1)
    return {curve.steps[n]: fmean(values[n - WINDOW : n]) - fmean(values[n : n + WINDOW]) for n in ends}


def breaks(found: Run, kills: dict[int, str]) -> Iterator[tuple[str, bool]]:
    """For each kill and source a sentence, and whether it is a break: a fall beyond all that are elsewhere.

    A restart is noticed some steps after its kill at most: the largest fall of those steps counts.
    """
    near = {step + late for step in kills for late in range(-WINDOW, 2 * WINDOW)}
    for source in found.sources:
        all_falls = falls(found.rewards(source))
        elsewhere = max((fall for step, fall in all_falls.items() if step not in near), default=0.0)
        for step, name in kills.items():
            here = [fall for at, fall in all_falls.items() if step <= at < step + WINDOW]
            if here:
                is_break = max(here) > max(elsewhere, SMALL_FALL)
                sentence = f"{name} killed at step {step}: {source} falls by {max(here):+.3f} at most"
                yield f"{sentence}; elsewhere by up to {elsewhere:+.3f}", is_break


def main() -> int:
    parser = argparse.ArgumentParser(description="The first run, with each of its processes killed once.")
    parser.add_argument("--steps", type=int, default=500, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--picture", type=Path, default=Path("demo-kills.png"), help="default: %(default)s")
    given = parser.parse_args()
    shares: dict[float, Victim] = {0.08: daemon, 0.4: engine, 0.56: trainer}  # where one source or the other is learned
    at = {round(given.steps * share): victim for share, victim in shares.items()}
    with tempfile.TemporaryDirectory(prefix="demo-kills-") as folder:
        show = killing(at, tell)
        found = run(Path(folder), schedule="curriculum", seed=given.seed, steps=given.steps, http=None, show=show)
    engine_kills = [
        Restart(step, "engine") for step, victim in at.items() if victim is engine
    ]  # nobody else knows them
    found = replace(found, restarts=(*found.restarts, *engine_kills))
    panel = Panel(f"curriculum, seed {given.seed}, a SIGKILL of each process", [found], given.steps)
    draw([panel], given.picture, title="A policy of 43,200 parameters learns to repeat digits")
    verdicts = list(breaks(found, {step: victim.__name__ for step, victim in at.items()}))
    for sentence, is_break in verdicts:
        print(("BREAK: " if is_break else "") + sentence)
    ends = ", ".join(f"{source} {found.rewards(source).last or 0:.3f}" for source in found.sources)
    print(f"rewards of the last steps: {ends}; the picture is {given.picture}")
    return FAILED if any(is_break for _, is_break in verdicts) else OK


def tell(moment: Moment) -> None:
    """Overwrite one line at the terminal."""
    print(f"\r{headline(moment)} ", end="", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
