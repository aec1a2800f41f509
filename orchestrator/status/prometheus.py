"""Prometheus metrics, made from the status object when they are asked for.

Invariants:

* Nothing is counted twice: every figure is one of the status, under a stable name with its unit.
* Labels are ``source``, ``engine``, ``state`` and ``reason``; their values come from the config and from a fixed list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

__all__ = ["render_metrics"]


class _StatusCollector(Collector):
    def __init__(self, status: Mapping[str, Any]) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        yield from _run(self._status)
        yield from _sources(self._status)
        yield from _engines(self._status)


def render_metrics(status: Callable[[], Mapping[str, Any]]) -> bytes:
    """The text exposition of the status as it is now."""
    registry = CollectorRegistry()
    registry.register(_StatusCollector(status()))
    return generate_latest(registry)


def _run(status: Mapping[str, Any]) -> Iterator[Metric]:
    state = status["state"]
    yield GaugeMetricFamily("rollout_step", "Batches formed so far.", value=status["step"])
    yield GaugeMetricFamily("rollout_policy_version", "Policy version in force.", value=status["policy_version"])
    yield GaugeMetricFamily("rollout_leases", "Shares not acknowledged.", value=len(status["leases"]))
    yield GaugeMetricFamily("rollout_connections", "Clients connected.", value=len(status["connections"]))
    yield GaugeMetricFamily("rollout_paused", "1 while generation is paused.", value=status["generation"]["paused"])
    yield GaugeMetricFamily("rollout_batch_waiting", "1 while no batch can be formed.", value=bool(status["cause"]))
    waited = status["starvation"]["waiting_s"] or 0.0
    yield GaugeMetricFamily("rollout_batch_waiting_seconds", "Since somebody waits for the next batch.", value=waited)
    yield CounterMetricFamily("rollout_state_written_bytes", "Written to the log.", value=state["written_bytes"])
    yield GaugeMetricFamily("rollout_state_backlog_bytes", "Not yet written.", value=state["backlog_bytes"])
    yield GaugeMetricFamily("rollout_state_fault", "1 while the disk fails.", value=bool(state["fault"]))


def _sources(status: Mapping[str, Any]) -> Iterator[Metric]:
    weight = GaugeMetricFamily("rollout_source_weight", "Share of the next batch, 0 to 1.", labels=["source"])
    groups = GaugeMetricFamily("rollout_source_groups", "Groups by where they are.", labels=["source", "state"])
    handed = CounterMetricFamily("rollout_source_handed_out_groups", "Groups handed out.", labels=["source"])
    dropped = CounterMetricFamily("rollout_source_dropped_groups", "Groups dropped.", labels=["source", "reason"])
    size = GaugeMetricFamily("rollout_source_buffered_bytes", "Finished groups in memory.", labels=["source"])
    accepted = GaugeMetricFamily("rollout_source_acceptance", "Share of groups the filter keeps.", labels=["source"])
    debt = GaugeMetricFamily("rollout_source_debt_groups", "Groups that others gave in its place.", labels=["source"])
    bias = GaugeMetricFamily(
        "rollout_source_length_bias", "Mean length handed out / launched and kept, minus 1.", labels=["source"]
    )
    plan = status["plan"][0]["weights"] if status["plan"] else {}
    for name, source in status["sources"].items():
        weight.add_metric([name], plan.get(name, 0.0))
        debt.add_metric([name], source["debt"])
        bias.add_metric([name], source["response_len"]["bias"]["overtaking"])
        for state in ("in_flight", "buffered", "leased"):
            groups.add_metric([name, state], source["groups"][state])
        handed.add_metric([name], source["handed_out"])
        for reason, count in source["dropped"].items():
            dropped.add_metric([name, reason], count["groups"])
        size.add_metric([name], source["buffered_bytes"])
        accepted.add_metric([name], source["producer"]["acceptance"])
    yield from (weight, debt, bias, groups, handed, dropped, size, accepted)


def _engines(status: Mapping[str, Any]) -> Iterator[Metric]:
    up = GaugeMetricFamily("rollout_engine_up", "1 while the engine is used.", labels=["engine"])
    flight = GaugeMetricFamily("rollout_engine_in_flight", "Requests under way.", labels=["engine"])
    completed = CounterMetricFamily("rollout_engine_completed_requests", "Requests that ended well.", labels=["engine"])
    failed = CounterMetricFamily("rollout_engine_failed_requests", "Requests that failed.", labels=["engine"])
    tokens = CounterMetricFamily("rollout_engine_tokens", "Tokens received.", labels=["engine"])
    for engine in status["engines"]:
        name = engine["name"]
        up.add_metric([name], float(engine["state"] == "up"))
        flight.add_metric([name], engine["in_flight"])
        completed.add_metric([name], engine["completed"])
        failed.add_metric([name], engine["failed"])
        tokens.add_metric([name], engine["tokens"])
    yield from (up, flight, completed, failed, tokens)
