"""Metrics of the archive and of the metrics sinks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from .metric import Kind, Metric, of_run

__all__ = ["OUTLETS"]

Facts = Mapping[str, Any]


def _archive(name: str, kind: Kind, unit: str, meaning: str, value: Callable[[Facts], float]) -> Metric:
    """A number of the archive; none where there is no archive."""
    return of_run(name, kind, unit, meaning, lambda s: None if s["archive"] is None else value(s["archive"]))


def _sink(name: str, kind: Kind, unit: str, meaning: str, value: Callable[[Facts], float]) -> Metric:
    """A number of each sink."""

    def read(status: Facts) -> Iterator[tuple[tuple[str, ...], float]]:
        return (((sink["name"],), float(value(sink))) for sink in status["sinks"])

    return Metric(name, kind, unit, meaning, ("sink",), read)


OUTLETS: Final = (
    _archive("rollout_archive_written_batches", "counter", "batches", "Batches written to it.", lambda a: a["written"]),
    _archive(
        "rollout_archive_given_up_batches",
        "counter",
        "batches",
        "Batches trained on but missing in the archive, because its disk failed for too long.",
        lambda a: a["given_up"],
    ),
    _archive(
        "rollout_archive_waiting_batches", "gauge", "batches", "Batches not archived yet.", lambda a: a["waiting"]
    ),
    _archive(
        "rollout_archive_fault",
        "gauge",
        "0 or 1",
        "1 while the archive cannot be written.",
        lambda a: a["fault"] is not None,
    ),
    _sink("rollout_sink_written_steps", "counter", "steps", "Steps written to the sink.", lambda s: s["written"]),
    _sink("rollout_sink_lost_steps", "counter", "steps", "Steps the sink did not take in time.", lambda s: s["lost"]),
    _sink("rollout_sink_queued_steps", "gauge", "steps", "Steps waiting for the sink.", lambda s: s["queued"]),
    _sink("rollout_sink_fault", "gauge", "0 or 1", "1 while the sink fails.", lambda s: s["fault"] is not None),
)
