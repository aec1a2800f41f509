"""The plot of one or more runs: rewards by source over the steps, and below them the mixture.

Invariants:

* Every run is drawn; runs are never averaged.
* Drawn with Pillow at three times the size and scaled down: matplotlib would double the size of the installation.
* Colour-blind readers can tell the colours (Okabe and Ito) apart, and every curve carries its source's name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from orchestrator.errors import OrchestratorError

from .progress import Curve, Run

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont

__all__ = ["Panel", "PictureError", "draw"]

COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
"""Okabe and Ito, "Color Universal Design" (2008), by the position of the source."""

INK, GREY, LIGHT = "#333333", "#999999", "#E4E4E4"

SCALE: Final = 3
"""Drawn this many times larger, because Pillow's lines have hard edges."""

WIDTH, PANEL_WIDTH = 900, 480
"""Pixels of a picture with one panel, and of each panel of several."""

HEIGHT: Final = 560
LEFT, RIGHT, TOP, BOTTOM = 54, 62, 64, 44
GAP: Final = 40
"""Between rewards and mixture."""

MIXTURE_SHARE: Final = 0.28
"""Share of the height for the mixture."""

MIXTURE_WINDOW: Final = 5
"""Steps: 20 % of 12 groups are 12 groups in 5 steps."""


class PictureError(OrchestratorError, RuntimeError):
    """The plot cannot be drawn or written."""

    code = "picture_failed"


@dataclass(frozen=True, slots=True)
class Panel:
    """A column: the runs of one schedule, of any number of seeds, over ``steps`` steps."""

    title: str
    runs: Sequence[Run]
    steps: int


def draw(panels: Sequence[Panel], path: Path, *, title: str) -> None:
    """Draw panels side by side into a PNG file.

    Raises:
        PictureError: Pillow is not installed, or the file cannot be written.
    """
    try:
        from PIL import Image, ImageDraw
    except ImportError as error:
        raise PictureError("the plot needs Pillow: pip install 'rollout-orchestrator[demo]'") from error
    width = WIDTH if len(panels) == 1 else PANEL_WIDTH * len(panels)
    image = Image.new("RGB", (width * SCALE, HEIGHT * SCALE), "white")
    brush = _Brush(ImageDraw.Draw(image))
    brush.text(LEFT, 20, title, size=17, anchor="lm")
    for number, panel in enumerate(panels):
        begin = width * number // len(panels)
        _draw_panel(brush, panel, begin, width // len(panels))
    small = image.resize((width, HEIGHT), Image.Resampling.LANCZOS).quantize(96)  # a third of the bytes, same look
    try:
        small.save(path, optimize=True)
    except (OSError, ValueError) as error:
        raise PictureError(f"cannot write {path}: {error}") from error


def _draw_panel(brush: _Brush, panel: Panel, begin: int, width: int) -> None:
    left, right, bottom = begin + LEFT, begin + width - RIGHT, HEIGHT - BOTTOM
    middle = bottom - (bottom - TOP) * MIXTURE_SHARE
    brush.text(left, TOP - 16, panel.title, size=14, anchor="lm")
    rewards = _Frame(brush, left, TOP, right, middle - GAP, panel.steps)
    rewards.axes("reward", (0.0, 0.5, 0.9, 1.0), steps=False)
    for restart in (restart for run in panel.runs for restart in run.restarts):
        rewards.mark(restart.step, f"{restart.name} restarted")
    _draw_rewards(rewards, panel)
    mixture = _Frame(brush, left, middle, right, bottom, panel.steps)
    mixture.axes("share of batch", (0.0, 0.5, 1.0), steps=True)
    _draw_mixture(mixture, panel)


def _draw_rewards(frame: _Frame, panel: Panel) -> None:
    labels: list[tuple[str, float, str]] = []
    for source, colour in _coloured(panel):
        curves = [run.rewards(source) for run in panel.runs]
        if len(curves) == 1:  # several runs would hide each other
            frame.dots(curves[0], _pale(colour))
        for curve in curves:
            frame.line(curve.smoothed(), colour, 2)
        last = [value for curve in curves if (value := curve.last) is not None]
        if last:
            labels.append((source, sum(last) / len(last), colour))
    frame.labels(labels)


def _draw_mixture(frame: _Frame, panel: Panel) -> None:
    """Asked for as a line; received as dots, each the mean of five steps, because a batch has whole groups."""
    labels = []
    for source, colour in _coloured(panel):
        for run in panel.runs:
            frame.line(run.asked(source), colour, 1.5)
            received = run.received(source).smoothed(MIXTURE_WINDOW)
            last_of_five = slice(MIXTURE_WINDOW - 1, None, MIXTURE_WINDOW)
            frame.dots(Curve(received.steps[last_of_five], received.values[last_of_five]), colour, radius=1.8)
        if panel.runs[0].steps:
            labels.append((source, panel.runs[0].steps[-1].weights[source], colour))
    frame.labels(labels)
    frame.brush.text(frame.left + 60, frame.top - 14, "line: weight, dots: received", size=11, anchor="lm", colour=GREY)


def _coloured(panel: Panel) -> list[tuple[str, str]]:
    sources = panel.runs[0].sources
    return [(source, COLOURS[number % len(COLOURS)]) for number, source in enumerate(sources)]


def _pale(colour: str) -> str:
    channels = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{255 - (255 - channel) * 3 // 10:02X}" for channel in channels)


class _Brush:
    """Draws in pixels of the finished plot."""

    def __init__(self, target: ImageDraw) -> None:
        self._target = target
        self._fonts: dict[int, FreeTypeFont | ImageFont] = {}

    def text(self, x: float, y: float, text: str, *, size: int, anchor: str, colour: str = INK) -> None:
        from PIL import ImageFont

        font = self._fonts.setdefault(size, ImageFont.load_default(size * SCALE))
        self._target.text((x * SCALE, y * SCALE), text, fill=colour, font=font, anchor=anchor)

    def line(self, points: Sequence[tuple[float, float]], colour: str, width: float) -> None:
        scaled = [(x * SCALE, y * SCALE) for x, y in points]
        self._target.line(scaled, fill=colour, width=round(width * SCALE), joint="curve")

    def dot(self, x: float, y: float, colour: str, radius: float) -> None:
        self._target.circle((x * SCALE, y * SCALE), radius * SCALE, fill=colour)


class _Frame:
    """A rectangle with steps from left to right and values of 0 to 1 from bottom to top."""

    def __init__(self, brush: _Brush, left: float, top: float, right: float, bottom: float, steps: int) -> None:
        self.brush = brush
        self.left, self.top, self._right, self._bottom = left, top, right, bottom
        self._steps = steps

    def _x(self, step: float) -> float:
        return self.left + (self._right - self.left) * step / self._steps

    def _y(self, value: float) -> float:
        return self._bottom - (self._bottom - self.top) * value

    def axes(self, name: str, values: Sequence[float], *, steps: bool) -> None:
        for value in values:
            y = self._y(value)
            self.brush.line([(self.left, y), (self._right, y)], LIGHT, 1)
            self.brush.text(self.left - 8, y, f"{value:g}", size=11, anchor="rm")
        self.brush.text(self.left - 42, self.top - 14, name, size=11, anchor="lm", colour=GREY)
        if not steps:
            return
        every = next(n for n in (5, 10, 20, 50, 100, 200, 500, 1000, 10**9) if self._steps / n <= 6)
        for step in range(0, self._steps + 1, every):
            self.brush.text(self._x(step), self._bottom + 12, str(step), size=11, anchor="mm")
        self.brush.text(self._right, self._bottom + 28, "step", size=11, anchor="rm", colour=GREY)

    def mark(self, step: float, text: str) -> None:
        """A dashed line from top to bottom, with a text under it."""
        x, y = self._x(step), self.top
        while y < self._bottom:
            self.brush.line([(x, y), (x, y + 4)], GREY, 1)
            y += 8
        self.brush.text(x, self._bottom + 9, text, size=11, anchor="mm", colour=GREY)

    def line(self, curve: Curve, colour: str, width: float) -> None:
        points = [(self._x(s), self._y(v)) for s, v in zip(curve.steps, curve.values, strict=True)]
        if len(points) > 1:
            self.brush.line(points, colour, width)

    def dots(self, curve: Curve, colour: str, radius: float = 1.4) -> None:
        for step, value in zip(curve.steps, curve.values, strict=True):
            self.brush.dot(self._x(step), self._y(value), colour, radius)

    def labels(self, labels: Sequence[tuple[str, float, str]]) -> None:
        """Names at the right edge, at their values, without overlapping."""
        lowest = self._bottom + 20.0
        for name, value, colour in sorted(labels, key=lambda label: label[1]):
            y = lowest = min(self._y(value), lowest - 15)
            self.brush.text(self._right + 8, y, name, size=13, anchor="lm", colour=colour)
