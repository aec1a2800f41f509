"""Prometheus metrics, made from the status object when they are asked for.

Invariants:

* What is exposed is the catalogue, and what the library tells of the process; nothing is kept between two scrapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from .catalogue import METRICS

__all__ = ["render_metrics"]


class _StatusCollector(Collector):
    def __init__(self, status: Mapping[str, Any]) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        for metric in (metric for section in METRICS.values() for metric in section):
            make = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
            family = make(metric.name, metric.meaning, labels=metric.labels)
            for labels, value in metric.read(self._status):
                family.add_metric(labels, value)
            yield family


def render_metrics(status: Mapping[str, Any]) -> bytes:
    """The text exposition of a status that has the newest step in its history."""
    registry = CollectorRegistry()
    registry.register(_StatusCollector(status))
    ProcessCollector(registry=registry)
    return generate_latest(registry)
