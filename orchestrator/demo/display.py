"""What the demo shows in the terminal: the live display of a run, and the tables at its end.

Invariants:

* Builds renderables from values; prints nothing and waits for nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any, Final

from .progress import LEARNED, WINDOW, Curve, Run

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from .run import Moment

__all__ = ["comparison", "headline", "live", "summary"]

BLOCKS: Final = "▁▂▃▄▅▆▇█"

WIDTH: Final = 80
"""Columns that a terminal has unless it says otherwise."""

WIDEST: Final = 120
TABLE_CELLS: Final = 63
"""Width of the table of sources without the curve, for names as long as these."""

SHORTEST_CURVE: Final = 8


def live(moment: Moment, width: int = WIDTH) -> RenderableType:
    """A run as it is now, for a terminal of ``width`` columns."""
    from rich.console import Group
    from rich.text import Text

    width = min(width, WIDEST)
    lines = [Text(headline(moment), "bold"), _bar(moment, width - 1), _sources(moment, width)]
    lines.append(Text(_events(moment), "dim"))
    if moment.http is not None:
        lines.append(Text(f"live page: http://{moment.http}/", "dim"))
    return Group(*lines)


def headline(moment: Moment) -> str:
    """One line: which run, its progress, and the time left."""
    done, of = len(moment.run.steps), moment.steps
    left = f", {_minutes(_seconds_left(moment))} left" if done >= WINDOW else ""
    return f"{moment.run.schedule}, seed {moment.run.seed}: step {done} of {of}, {_minutes(moment.run.seconds)}{left}"


def _seconds_left(moment: Moment) -> float:
    steps = moment.run.steps[-5 * WINDOW :]
    return (moment.steps - len(moment.run.steps)) * (steps[-1].time - steps[0].time) / (len(steps) - 1)


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def _bar(moment: Moment, cells: int) -> RenderableType:
    from rich.text import Text

    full = round(cells * len(moment.run.steps) / moment.steps)
    return Text.assemble(("━" * full, "green"), ("─" * (cells - full), "dim"))


def _sources(moment: Moment, width: int) -> Table:
    table = _table("source", "weight", "groups", "buffered", "in flight", "reward", "history")
    cells = max(SHORTEST_CURVE, width - TABLE_CELLS)
    for name in moment.run.sources:
        last = moment.run.steps[-1] if moment.run.steps else None
        groups = moment.status["sources"][name]["groups"] if moment.status is not None else {}
        rewards = moment.run.rewards(name)
        table.add_row(
            name,
            f"{last.weights[name]:.0%}" if last else "",
            str(last.counts[name]) if last else "",
            str(groups.get("buffered", "")),
            str(groups.get("in_flight", "")),
            "" if rewards.last is None else f"{rewards.last:.2f}",
            _curve(rewards, moment.steps, cells),
        )
    return table


def _curve(curve: Curve, steps: int, cells: int) -> str:
    """Rewards over the whole run in ``cells`` cells; blank where the source was not in a batch, or not yet."""
    found: list[list[float]] = [[] for _ in range(cells)]
    for step, value in zip(curve.steps, curve.values, strict=True):
        found[min(cells - 1, step * cells // steps)].append(value)
    return "".join(BLOCKS[min(7, int(8 * fmean(cell)))] if cell else " " for cell in found)


def _events(moment: Moment) -> str:
    """The policy version, samples continued across versions, and restarts."""
    steps = moment.run.steps
    parts = [f"policy version {steps[-1].step + 1 if steps else 0}"]
    parts.append(f"{moment.run.continued} of {sum(s.samples for s in steps)} samples continued across versions")
    counts = Counter(restart.name for restart in moment.run.restarts)
    parts += [f"{name} restarts: {count}" for name, count in counts.items()]
    parts += _engine_trouble(moment.status)
    return " · ".join(parts)


def _engine_trouble(status: dict[str, Any] | None) -> list[str]:
    if status is None:
        return ["the daemon is not answering"]
    return [f"engine {e['name']}: {e['state']}" for e in status["engines"] if e["state"] not in ("up", "updating")]


def summary(run: Run) -> Table:
    """The mixture asked for and received, and what was learned."""
    table = _table("source", "target groups", "received", "difference", "reward", f"{LEARNED} since step")
    for name in run.sources:
        asked, received = run.groups_asked(name), run.groups_received(name)
        last, learned_at = run.rewards(name).last, run.learned_at(name)
        table.add_row(
            name,
            f"{asked:.2f}",
            str(received),
            f"{round(received - asked, 2) + 0.0:+.2f}",
            "never seen" if last is None else f"{last:.3f}",
            "never" if learned_at is None else str(learned_at),
        )
    samples = sum(step.samples for step in run.steps)
    table.title = f"{run.schedule}, seed {run.seed}: {len(run.steps)} steps, {samples} samples in {run.seconds:.0f} s"
    table.caption = (
        f"Reward: mean of the last {WINDOW} steps. New parameters interrupted {run.continued} samples, which continued"
        f" with them. Log-probabilities of trainer and engine agree to {run.gap:.5f}."
    )
    return table


def comparison(runs: Sequence[Run]) -> Table:
    """All runs, one a row."""
    sources = runs[0].sources
    columns = [f"{name}: {what}" for name in sources for what in ("reward", f"{LEARNED} since")]
    table = _table("schedule", "seed", "seconds", *columns)
    for run in runs:
        cells: list[str] = []
        for name in sources:
            last, learned_at = run.rewards(name).last, run.learned_at(name)
            cells += ["–" if last is None else f"{last:.3f}", "–" if learned_at is None else str(learned_at)]
        table.add_row(run.schedule, str(run.seed), f"{run.seconds:.0f}", *cells)
    return table


def _table(*columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column in ("source", "schedule", "history") else "right")
    return table
