"""The picture of a curriculum: shares of the weights, and beneath them the whole groups that they become.

Invariants:

* matplotlib is imported when a picture is drawn and not before; without it the error names the extra.
* No global state of matplotlib is touched: no pyplot, no backend chosen.
* Every area carries its source's name; the colours (Okabe and Ito) are told apart by colour-blind readers too.
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
"""Okabe and Ito, "Color Universal Design" (2008), light ones first, grey for black; used again after eight."""

DARK: Final = frozenset({"#0072B2", "#009E73", "#D55E00"})
"""Colours on which a label is white."""

SIZE_INCHES: Final = (8.0, 5.2)
DOTS_PER_INCH: Final = 160
"""1280 × 832 pixels; the type is still legible when a page shows it 800 wide."""

THINNEST_LABELLED: Final = 0.05
"""Share of the height that an area needs for a line of text; the names of thinner ones stand beneath the picture."""

INK: Final = "#333333"


class PlotError(OrchestratorError, RuntimeError):
    """The picture cannot be drawn or written."""

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
            "a picture needs matplotlib, which is not installed: pip install 'rollout-orchestrator[plot]'"
        ) from error
    if path.suffix.lower() != ".png":
        raise PlotError(f"{path}: pictures are PNG files; write --plot {path.with_suffix('.png').name}")
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
        raise PlotError(f"{path}: cannot be written: {error.strerror or error}") from error


def _stack(
    axes: Any, batches: Sequence[PlannedBatch], rows: Sequence[Sequence[float]], labels: Sequence[str]
) -> list[str]:
    """Stack one area for each row; returns the labels that found no room."""
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
    """Write the name where its area is thick, and near the middle rather than at an edge; whether there was room."""
    import numpy as np

    # A label is some steps wide: the area has to be thick over a tenth of the picture around its middle.
    half = max(1, len(steps) // 20)
    floor = np.array([low[max(0, i - half) : i + half + 1].max() for i in range(len(steps))])
    ceiling = np.array([high[max(0, i - half) : i + half + 1].min() for i in range(len(steps))])
    room = ceiling - floor
    margin = max(1, round(len(steps) * 0.12)) if len(steps) > 8 else 0
    inside = slice(margin, len(steps) - margin)
    best = margin + int(np.argmax(room[inside]))
    if room[best] < THINNEST_LABELLED:
        return False
    axes.text(
        steps[best],
        (floor[best] + ceiling[best]) / 2,
        name,
        ha="center",
        va="center",
        fontsize=12,
        color="white" if colour in DARK else "black",
        transform=axes.get_xaxis_transform(),
        clip_on=True,
    )
    return True
