"""Metrics of each source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from .metric import Metric, of_source

__all__ = ["SOURCES"]


def _groups(status: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], float]]:
    for name, source in status["sources"].items():
        for where in ("in_flight", "buffered", "leased"):
            yield (name, where), source["groups"][where]


def _dropped(what: str) -> Any:
    def read(status: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], float]]:
        for name, source in status["sources"].items():
            for reason, count in source["dropped"].items():
                yield (name, reason), count[what]

    return read


def _lengths(status: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], float]]:
    for name, source in status["sources"].items():
        for which in ("handed_out", "launched", "kept", "overtaken"):
            yield (name, which), source["response_len"][which]


def _calls(status: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], float]]:
    for name, source in status["sources"].items():
        for outcome in ("scored", "failed", "timed_out", "unavailable"):
            yield (name, outcome), source["reward"][outcome]


def _shares(status: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], float]]:
    plan = status["plan"][0]["weights"] if status["plan"] else {}
    for name in status["sources"]:
        yield (name,), plan.get(name, 0.0)


SOURCES: Final = (
    Metric("rollout_source_weight", "gauge", "share", "Share of the next batch, 0 to 1.", ("source",), _shares),
    of_source(
        "rollout_source_carry_groups", "gauge", "groups", "Remainder carried to the next batch.", lambda s: s["carry"]
    ),
    of_source(
        "rollout_source_debt_groups",
        "gauge",
        "groups",
        "Groups that others gave in its place; negative: that it gave for others.",
        lambda s: s["debt"],
    ),
    of_source("rollout_source_paused", "gauge", "0 or 1", "1 while the source is paused.", lambda s: s["paused"]),
    of_source(
        "rollout_source_exhausted", "gauge", "0 or 1", "1 when it has no prompts left.", lambda s: s["exhausted"]
    ),
    Metric(
        "rollout_source_groups",
        "gauge",
        "groups",
        "Groups by state: in_flight, buffered or leased.",
        ("source", "state"),
        _groups,
    ),
    of_source(
        "rollout_source_partial_groups",
        "gauge",
        "groups",
        "Groups in flight that have partial rollouts.",
        lambda s: s["partial_groups"],
    ),
    of_source(
        "rollout_source_buffered_bytes", "gauge", "bytes", "Size of the buffered groups.", lambda s: s["buffered_bytes"]
    ),
    of_source(
        "rollout_source_planned_groups",
        "gauge",
        "groups",
        "Groups planned for the coming batches.",
        lambda s: s["wanted"],
    ),
    of_source(
        "rollout_source_next_groups", "gauge", "groups", "Groups planned for the next batch.", lambda s: s["next_count"]
    ),
    of_source(
        "rollout_source_bound_groups", "gauge", "groups", "Most groups in flight and buffered.", lambda s: s["bound"]
    ),
    of_source(
        "rollout_source_launched_groups",
        "counter",
        "groups",
        "Groups launched, over the whole run.",
        lambda s: s["groups"]["launched"],
    ),
    of_source(
        "rollout_source_handed_out_groups",
        "counter",
        "groups",
        "Groups handed out, over the whole run.",
        lambda s: s["handed_out"],
    ),
    of_source(
        "rollout_source_acknowledged_groups",
        "counter",
        "groups",
        "Groups acknowledged, over the whole run.",
        lambda s: s["groups"]["acknowledged"],
    ),
    Metric(
        "rollout_source_dropped_groups",
        "counter",
        "groups",
        "Groups dropped, over the whole run.",
        ("source", "reason"),
        _dropped("groups"),
    ),
    Metric(
        "rollout_source_dropped_response_tokens",
        "gauge",
        "tokens",
        "Mean length of dropped responses.",
        ("source", "reason"),
        _dropped("mean_tokens"),
    ),
    Metric(
        "rollout_source_response_tokens",
        "gauge",
        "tokens",
        "Mean length of responses over the whole run: handed_out, launched, kept by the filter, or overtaken.",
        ("source", "which"),
        _lengths,
    ),
    of_source(
        "rollout_source_length_bias",
        "gauge",
        "ratio",
        "Mean length handed out ÷ launched and kept, minus 1.",
        lambda s: s["response_len"]["bias"]["overtaking"],
    ),
    of_source(
        "rollout_source_overtakings",
        "counter",
        "groups",
        "Groups overtaken by a later one, over the whole run.",
        lambda s: s["overtakings"],
    ),
    of_source(
        "rollout_source_acceptance",
        "gauge",
        "share",
        "Share of recently finished groups that pass the filter.",
        lambda s: s["producer"]["acceptance"],
    ),
    of_source(
        "rollout_source_failed_samples",
        "counter",
        "samples",
        "Samples that used up their retries.",
        lambda s: s["producer"]["failed_samples"],
    ),
    of_source(
        "rollout_source_replaced_samples",
        "counter",
        "samples",
        "New attempts for failed ones.",
        lambda s: s["producer"]["replaced_samples"],
    ),
    of_source(
        "rollout_source_over_bound_groups",
        "counter",
        "groups",
        "Launched beyond the bound because the next batch lacked them.",
        lambda s: s["producer"]["over_bound"],
    ),
    Metric(
        "rollout_source_reward_calls",
        "counter",
        "calls",
        "Reward calls by outcome: scored, failed, timed_out, unavailable.",
        ("source", "outcome"),
        _calls,
    ),
    of_source(
        "rollout_source_reward_calls_running",
        "gauge",
        "calls",
        "Reward calls running.",
        lambda s: s["reward"]["running"],
    ),
    of_source(
        "rollout_source_epoch", "gauge", "epochs", "Passes through its prompts, from 0.", lambda s: s["cursor"]["epoch"]
    ),
    of_source("rollout_source_prompts", "gauge", "prompts", "Prompts of the source.", lambda s: s["cursor"]["prompts"]),
)
