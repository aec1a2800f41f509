"""One picture of a benchmark: cost by size, each contender a line; both axes logarithmic: a slope is a power."""

from __future__ import annotations

from pathlib import Path

from .result import Result


def draw(result: Result, folder: Path) -> Path:
    """Write ``{name}.png`` and return its path."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name in dict.fromkeys(figure.contender for figure in result.figures):
        points = sorted((f.size, f.cpu_us) for f in result.figures if f.contender == name)
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel=result.size, ylabel=f"µs of CPU {result.unit}", title=result.title)
    axes.grid(alpha=0.3)
    axes.legend()
    path = folder / f"{result.name}.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
