"""The figures that the page plots: those of each source over the steps, in bounded memory.

Invariants:

* A point holds a step's figures in compact form. The same function picks them for a live step and for one that is read
  back after a restart, so that a curve does not change where the daemon was restarted.
* At most :data:`MAX_POINTS` and :data:`MAX_BYTES`. When full, every second point of the older half is removed: a run of
  months is shown from its first step on, and its last hours in full.
* Steps rise. A step that is not above the newest one (a checkpoint was loaded) replaces all later points.
* Points are numbered as they arrive, so that a reader who has seen some can ask for the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import orjson

from .step_metrics import StepReport

__all__ = ["FIELDS", "MAX_BYTES", "MAX_POINTS", "StepHistory", "report_point", "step_point"]

MAX_POINTS: Final = 1024
"""More than a chart has pixels."""

MAX_BYTES: Final = 8 << 20
"""8 MiB: full resolution for some 50 sources."""

FIELDS: Final = (
    "weight",
    "group_count",
    "sample_count",
    "raw_reward/mean",
    "raw_reward/std",
    "raw_reward/min",
    "raw_reward/max",
    "response_len/mean",
    "response_len/min",
    "response_len/max",
    "staleness/mean",
    "staleness/max",
    "buffer_groups",
    "in_flight",
    "resumed_samples",
    "dropped",
)
"""The numbers of one source in a point, in this order; ``dropped``, the last, is the sum over all reasons."""

WAIT: Final = "rollout/trainer_wait_s"
"""The one figure of a step that belongs to no source."""


def step_point(step: int, policy_version: int, time_s: float | None, metrics: Mapping[str, float]) -> dict[str, Any]:
    """A point as the page gets it: ``{"step", "policy_version", "time", "wait_s", "sources": {name: [numbers]}}``.

    Args:
        step: whose batch it was.
        policy_version: in force then.
        time_s: when it formed, in seconds since 1970, if known.
        metrics: the step's figures under slashed names; those that a point does not have are ignored.
    """
    sources: dict[str, dict[str, Any]] = {}
    for name, value in metrics.items():
        parts = name.split("/", 2)  # source names have no slash
        if len(parts) < 3 or parts[0] != "rollout" or not math.isfinite(value):
            continue
        key, _, inner = parts[2].partition("/")
        if key == "dropped" or parts[2] in FIELDS:
            figures = sources.setdefault(parts[1], {})
            if inner:
                figures.setdefault(key, {})[inner] = value
            else:
                figures[key] = value
    return _point(step, policy_version, time_s, metrics.get(WAIT), sources)


def report_point(report: StepReport, time_s: float) -> dict[str, Any]:
    """The point of a step whose report is at hand; see :func:`step_point`."""
    return _point(report.step, report.policy_version, time_s, report.trainer_wait_s, report.sources)


def _point(
    step: int,
    policy_version: int,
    time_s: float | None,
    wait_s: float | None,
    sources: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    return {
        "step": step,
        "policy_version": policy_version,
        "time": time_s,
        "wait_s": wait_s,
        "sources": {name: _numbers(metrics) for name, metrics in sources.items()},
    }


_PATHS: Final = tuple((key, inner) for key, _, inner in (field.partition("/") for field in FIELDS[:-1]))


def _numbers(metrics: Mapping[str, Any]) -> list[float | None]:
    """Of one source, nested, the figures of :data:`FIELDS`; ``None`` for one that it does not have."""
    numbers: list[float | None] = []
    for key, inner in _PATHS:
        value = metrics.get(key)
        numbers.append(value.get(inner) if inner and value is not None else value)
    numbers.append(sum(metrics.get("dropped", {}).values()))
    return numbers


@dataclass(frozen=True, slots=True)
class _Point:
    number: int
    step: int
    encoded: bytes


class StepHistory:
    """See the module's invariants.

    Args:
        max_points: see :data:`MAX_POINTS`.
        max_bytes: see :data:`MAX_BYTES`.
    """

    def __init__(self, *, max_points: int = MAX_POINTS, max_bytes: int = MAX_BYTES) -> None:
        self._max_points = max_points
        self._max_bytes = max_bytes
        self._points: list[_Point] = []
        self._bytes = 0
        self.newest = 0
        """Number of the newest point; 0: there was none."""

    def add(self, point: Mapping[str, Any]) -> None:
        """One more step; see :func:`step_point`."""
        while self._points and self._points[-1].step >= point["step"]:
            self._bytes -= len(self._points.pop().encoded)
        self.newest += 1
        self._points.append(_Point(self.newest, point["step"], orjson.dumps(point)))
        self._bytes += len(self._points[-1].encoded)
        while len(self._points) > 1 and (len(self._points) > self._max_points or self._bytes > self._max_bytes):
            self._thin()

    def refill(self, points: Iterable[Mapping[str, Any]], *, below: int) -> None:
        """Add the steps from before a restart that are below the one at which the run continues."""
        for point in points:
            if point["step"] < below:
                self.add(point)

    def _thin(self) -> None:
        half = max(2, len(self._points) // 2)
        self._points = self._points[:half:2] + self._points[half:]
        self._bytes = sum(len(point.encoded) for point in self._points)

    def since(self, number: int) -> Iterator[bytes]:
        """The points with a higher number, as JSON; 0: all."""
        return (point.encoded for point in self._points if point.number > number)

    def last(self, count: int) -> list[dict[str, Any]]:
        """The newest points, oldest first."""
        return [orjson.loads(point.encoded) for point in self._points[-count:]] if count > 0 else []

    def __len__(self) -> int:
        return len(self._points)
