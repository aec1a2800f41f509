"""Metrics of the whole run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from .metric import Metric, of_run

__all__ = ["RUN"]


def _cause(status: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], float]]:
    if status["cause"] is not None:
        yield (status["cause"]["kind"],), 1.0


def _source_cause(status: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], float]]:
    for entry in status["cause"]["sources"] if status["cause"] is not None else ():
        yield (entry["source"], entry["kind"]), entry["lacks"]


def _info(status: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], float]]:
    yield (status["run"]["name"], status["run"]["version"]), 1.0


def _oldest_lease(status: Mapping[str, Any]) -> float:
    return max((lease["held_s"] or 0.0 for lease in status["leases"]), default=0.0)


RUN: Final = (
    Metric("rollout_run_info", "gauge", "1", "Name of the run and version of the daemon.", ("run", "version"), _info),
    of_run("rollout_step", "gauge", "batches", "Batches formed so far: the step of the next one.", lambda s: s["step"]),
    of_run("rollout_policy_version", "gauge", "version", "Policy version in force.", lambda s: s["policy_version"]),
    of_run("rollout_uptime_seconds", "gauge", "s", "Time since the daemon started.", lambda s: s["run"]["uptime_s"]),
    of_run(
        "rollout_finished", "gauge", "0 or 1", "1 when the run has no batch left to form.", lambda s: s["is_finished"]
    ),
    of_run("rollout_leases", "gauge", "shares", "Shares handed out and not acknowledged.", lambda s: len(s["leases"])),
    of_run(
        "rollout_oldest_lease_seconds",
        "gauge",
        "s",
        "How long the trainer has held its oldest share; 0: it holds none.",
        _oldest_lease,
    ),
    of_run("rollout_connections", "gauge", "clients", "Clients connected.", lambda s: len(s["connections"])),
    of_run("rollout_paused", "gauge", "0 or 1", "1 while generation is paused.", lambda s: s["generation"]["paused"]),
    of_run(
        "rollout_draining",
        "gauge",
        "0 or 1",
        "1 when nothing new is launched.",
        lambda s: s["generation"]["draining"],
    ),
    of_run(
        "rollout_requests_in_flight",
        "gauge",
        "requests",
        "Requests in flight at all engines.",
        lambda s: s["generation"]["in_flight"],
    ),
    of_run(
        "rollout_requests_waiting",
        "gauge",
        "requests",
        "Requests that wait for a slot at an engine.",
        lambda s: s["generation"]["waiting"],
    ),
    of_run(
        "rollout_batch_waiting",
        "gauge",
        "0 or 1",
        "1 while the next batch cannot be formed or taken.",
        lambda s: bool(s["cause"]),
    ),
    of_run(
        "rollout_batch_waiting_seconds",
        "gauge",
        "s",
        "Time since the next batch was asked for and could not be formed; 0: it can be, or was not asked for.",
        lambda s: s["starvation"]["waiting_s"] or 0.0,
    ),
    of_run(
        "rollout_trainer_requests_waiting",
        "gauge",
        "requests",
        "Requests for a batch that are waiting.",
        lambda s: s["starvation"]["waiting"],
    ),
    of_run(
        "rollout_borrowing",
        "gauge",
        "0 or 1",
        "1 while sources may stand in for others.",
        lambda s: s["starvation"]["is_borrowing"],
    ),
    Metric(
        "rollout_cause",
        "gauge",
        "1",
        "Why the next batch cannot be formed or taken, by kind; no sample: it can.",
        ("kind",),
        _cause,
    ),
    Metric(
        "rollout_source_lacks_groups",
        "gauge",
        "groups",
        "Groups of a source that the next batch lacks, by kind of cause.",
        ("source", "kind"),
        _source_cause,
    ),
    of_run(
        "rollout_state_written_bytes",
        "counter",
        "bytes",
        "Bytes written to the state log since the daemon started.",
        lambda s: s["state"]["written_bytes"],
    ),
    of_run(
        "rollout_state_backlog_bytes", "gauge", "bytes", "Bytes not written yet.", lambda s: s["state"]["backlog_bytes"]
    ),
    of_run("rollout_state_segments", "gauge", "files", "Files of the state log.", lambda s: s["state"]["segments"]),
    of_run("rollout_state_fault", "gauge", "0 or 1", "1 while the disk fails.", lambda s: bool(s["state"]["fault"])),
    of_run(
        "rollout_state_problems",
        "gauge",
        "problems",
        "Damaged places found at startup.",
        lambda s: len(s["problems"]),
    ),
)
