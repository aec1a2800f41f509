"""Metrics of each engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from .metric import Metric, of_engine

__all__ = ["ENGINES"]


def _states(status: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], float]]:
    for engine in status["engines"]:
        yield (engine["name"], engine["state"]), 1.0


ENGINES: Final = (
    of_engine(
        "rollout_engine_up",
        "gauge",
        "0 or 1",
        "1 while the engine is up.",
        lambda e: e["state"] == "up",
    ),
    Metric(
        "rollout_engine_state",
        "gauge",
        "1",
        "Its state: up, trial, down, outdated, updating or draining.",
        ("engine", "state"),
        _states,
    ),
    of_engine("rollout_engine_in_flight", "gauge", "requests", "Requests in flight.", lambda e: e["in_flight"]),
    of_engine("rollout_engine_max_in_flight", "gauge", "requests", "Slots.", lambda e: e["max_in_flight"]),
    of_engine("rollout_engine_completed_requests", "counter", "requests", "Completed.", lambda e: e["completed"]),
    of_engine(
        "rollout_engine_failed_requests",
        "counter",
        "requests",
        "Requests that failed through the engine's fault.",
        lambda e: e["failed"],
    ),
    of_engine(
        "rollout_engine_stalled_requests",
        "counter",
        "requests",
        "Failed requests that sent no token for too long.",
        lambda e: e["stalled"],
    ),
    of_engine(
        "rollout_engine_late_requests",
        "counter",
        "requests",
        "Requests that moved to another engine because their first token was late.",
        lambda e: e["late"],
    ),
    of_engine(
        "rollout_engine_interrupted_requests",
        "counter",
        "requests",
        "Requests that the daemon interrupted.",
        lambda e: e["interrupted"],
    ),
    of_engine("rollout_engine_tokens", "counter", "tokens", "Tokens received.", lambda e: e["tokens"]),
    of_engine(
        "rollout_engine_first_token_seconds",
        "gauge",
        "s",
        "Time from a request to its first token, smoothed.",
        lambda e: e["first_token_s"],
    ),
    of_engine(
        "rollout_engine_policy_version",
        "gauge",
        "version",
        "Policy version that it is known to hold.",
        lambda e: e["policy_version"],
    ),
)
