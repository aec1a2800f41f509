"""One picture of a benchmark: cost by size, each contender a line; both axes logarithmic: a slope is a power.

The horizontal axis is marked at the sizes that were measured, the vertical one from a round number below the least cost
to one above the greatest. The names stand beside the lines and not on them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tests.bench.result import Result

STEPS: Final = (1, 2, 5)
LEAST: Final = 0.1
"""What is drawn where there was nothing to wait for, which a logarithmic axis does not have."""

MARKERS: Final = "osD^vP*X<>"


def marks(least: float, greatest: float) -> list[float]:
    """The numbers 1, 2, 5, 10, 20 … from the last one up to ``least`` to the first one from ``greatest`` on."""

    def all_marks() -> Iterator[float]:
        exponent = math.floor(math.log10(least))
        while True:
            yield from (step * 10.0**exponent for step in STEPS)
            exponent += 1

    found: list[float] = []
    for mark in all_marks():
        found = [*found, mark] if mark > least else [mark]
        if mark >= greatest and len(found) > 1:
            return found
    raise AssertionError


def draw(result: Result, folder: Path) -> Path:
    """Write ``{name}.png`` and return its path."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    cost = {(f.contender, f.size): max(LEAST, f.wall_us if result.is_of_waits else f.cpu_us) for f in result.figures}
    sizes = sorted({size for _, size in cost})
    heights = marks(min(cost.values()), max(cost.values()))
    for i, name in enumerate(dict.fromkeys(contender for contender, _ in cost)):
        points = [(size, cost[name, size]) for size in sizes if (name, size) in cost]
        marker, line = MARKERS[i % len(MARKERS)], "-" if len(points) > 1 else ""
        axes.plot(*zip(*points, strict=True), marker=marker, linestyle=line, label=name, clip_on=False)
    what = "µs" if result.is_of_waits else "µs of CPU"
    axes.set(xscale="log", yscale="log", xlabel=result.size, ylabel=f"{what} {result.unit}", title=result.title)
    axes.set_xticks(sizes, [f"{size:,g}" for size in sizes])
    axes.set_yticks(heights, [f"{height:,g}" if height < 1 else f"{height:,.0f}" for height in heights])
    axes.set_ylim(heights[0], heights[-1])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    path = folder / f"{result.name}.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
