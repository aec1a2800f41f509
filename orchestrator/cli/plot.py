"""The plot of a curriculum: each source's share of the weights, and below it the whole groups that it becomes.

Invariants:

* matplotlib is imported only when a plot is drawn; without it the error names the extra to install.
* No global state of matplotlib is touched: no pyplot, no choice of backend.
* Every area carries its source's name. Colour-blind readers can tell the colours (Okabe and Ito) apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from orchestrator.errors import OrchestratorError

if TYPE_CHECKING:
    from orchestrator.core.mixture.plan import PlannedBatch

__all__ = ["PlotError", "draw_weights"]

COLOURS: Final = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#0072B2", "#D55E00", "#BBBBBB")
"""Okabe and Ito, "Color Universal Design" (2008), light ones first, grey instead of black; reused after eight."""

DARK: Final = frozenset({"#0072B2", "#009E73", "#D55E00"})
"""Colours on which a label is white."""

SIZE_INCHES: Final = (8.0, 5.2)
DOTS_PER_INCH: Final = 160
"""1280 × 832 pixels; the text is still legible when a page shows it 800 pixels wide."""

THINNEST_LABELLED: Final = 0.05
"""Share of the height that an area needs for a line of text; the names of thinner ones are listed below the plot."""

INK: Final = "#333333"


class PlotError(OrchestratorError, RuntimeError):
    """The plot cannot be drawn or written."""

    code = "plot_failed"


def draw_weights(batches: Sequence[PlannedBatch], names: Sequence[str], path: Path, *, title: str) -> None:
    """Draw the shares [steps, sources] and group counts of the batches into a PNG file.

    Raises:
        PlotError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlotError(
            "--plot needs matplotlib, which is not installed: pip install 'rollout-orchestrator[plot]'"
        ) from error
    if path.suffix.lower() != ".png":
        raise PlotError(f"{path}: the plot is a PNG file; use --plot {path.with_suffix('.png').name}")
    figure = Figure(figsize=SIZE_INCHES, dpi=DOTS_PER_INCH, facecolor="white", layout="constrained")
    shares, counts = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    size = sum(batches[0].counts.values())
    unlabelled = _stack(shares, batches, [[batch.shares[name] for batch in batches] for name in names], names)
    _stack(counts, batches, [[batch.counts[name] for batch in batches] for name in names], ())
    shares.set_ylim(0, 1)
    shares.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    shares.set_ylabel("weight", color=INK)
    counts.set_ylim(0, size)
    counts.set_yticks(sorted({0, size // 4, size // 2, 3 * size // 4, size}))
    counts.set_ylabel(f"groups, of {size}", color=INK)
    counts.set_xlabel("step" + (f"\ntoo thin for a label: {', '.join(unlabelled)}" if unlabelled else ""), color=INK)
    shares.set_title(title, loc="left", fontsize=12, color=INK, pad=10)
    figure.align_ylabels()
    try:
        figure.savefig(path)
    except OSError as error:
        raise PlotError(f"cannot write {path}: {error.strerror or error}") from error


def _stack(
    axes: Any, batches: Sequence[PlannedBatch], rows: Sequence[Sequence[float]], labels: Sequence[str]
) -> list[str]:
    """Stack one area for each row; returns the labels that did not fit."""
    import numpy as np

    # A step's value holds from its number to the next; the last one is repeated for its right edge.
    steps = np.append([batch.step for batch in batches], batches[-1].step + 1)
    values = np.array(rows, dtype=float)
    edges = np.vstack([np.zeros(len(batches)), np.cumsum(values, axis=0)])
    total = edges[-1].max()
    unlabelled = []
    for index in range(len(rows)):
        colour = COLOURS[index % len(COLOURS)]
        low, high = (np.append(edge, edge[-1]) for edge in (edges[index], edges[index + 1]))
        axes.fill_between(steps, low, high, step="post", facecolor=colour, edgecolor="none", rasterized=True)
        axes.step(steps, high, where="post", color="white", linewidth=0.8)
        if index < len(labels) and not _label(axes, steps, low / total, high / total, labels[index], colour):
            unlabelled.append(labels[index])
    axes.set_xlim(steps[0], steps[-1])
    axes.tick_params(colors=INK, labelsize=10)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return unlabelled


def _label(axes: Any, steps: Any, low: Any, high: Any, name: str, colour: str) -> bool:
    """Write the name where its area is thickest, away from the edges; returns whether it fitted."""
    import numpy as np

    # A label is several steps wide: the area has to be thick over a tenth of the plot.
    half = max(1, len(steps) // 20)
    bottom = np.array([low[max(0, i - half) : i + half + 1].max() for i in range(len(steps))])
    top = np.array([high[max(0, i - half) : i + half + 1].min() for i in range(len(steps))])
    thickness = top - bottom
    margin = max(1, round(len(steps) * 0.12)) if len(steps) > 8 else 0
    inside = slice(margin, len(steps) - margin)
    best = margin + int(np.argmax(thickness[inside]))
    if thickness[best] < THINNEST_LABELLED:
        return False
    axes.text(
        steps[best],
        (bottom[best] + top[best]) / 2,
        name,
        ha="center",
        va="center",
        fontsize=12,
        color="white" if colour in DARK else "black",
        transform=axes.get_xaxis_transform(),
        clip_on=True,
    )
    return True
