"""What the page draws: figures of each source over the steps, kept in memory within bounds.

Invariants:

* A point is a step's figures under the seed's names, in fewer bytes: live steps and those that are read back after a
  restart come by the same function, so that a curve does not change where the daemon was restarted.
* At most :data:`MAX_POINTS` and :data:`MAX_BYTES`. When full, every second point of the older half goes: a run of
  months is shown from its first step on, the last hours of it in full.
* Steps rise. A step that is not above the newest one (a checkpoint was loaded) takes the place of what came after it.
* Points are numbered as they come, so that a reader who has seen some can ask for the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import orjson

__all__ = ["FIELDS", "MAX_BYTES", "MAX_POINTS", "StepHistory", "step_point"]

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
"""The one figure of a step that is of no source."""


def step_point(step: int, policy_version: int, time_s: float | None, metrics: Mapping[str, float]) -> dict[str, Any]:
    """A point as the page gets it: ``{"step", "policy_version", "time", "wait_s", "sources": {name: [numbers]}}``.

    Args:
        step: whose batch it was.
        policy_version: in force then.
        time_s: when it formed, in seconds since 1970, if known.
        metrics: the step's figures under slashed names; those that a point does not have are ignored.
    """
    sources: dict[str, list[float | None]] = {}
    for name, value in metrics.items():
        place = _place(name)
        if place is None or not math.isfinite(value):
            continue
        source, at = place
        numbers = sources.setdefault(source, [None] * (len(FIELDS) - 1) + [0])
        numbers[at] = (numbers[at] or 0) + value if FIELDS[at] == "dropped" else value
    return {
        "step": step,
        "policy_version": policy_version,
        "time": time_s,
        "wait_s": metrics.get(WAIT),
        "sources": sources,
    }


_PLACES: Final = {field: at for at, field in enumerate(FIELDS)}


def _place(name: str) -> tuple[str, int] | None:
    """Source and position of ``rollout/{source}/{field}``; source names have no slash."""
    parts = name.split("/", 2)
    if len(parts) < 3 or parts[0] != "rollout":
        return None
    field = "dropped" if parts[2].startswith("dropped/") else parts[2]
    return (parts[1], _PLACES[field]) if field in _PLACES else None


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
        """Steps of before a restart, all below the one that the run goes on at."""
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
