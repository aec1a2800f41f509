"""The status: everything that ``orchestrator status --json`` prints, as one JSON-compatible object.

Invariants:

* Group counts of a source add up: launched = in flight + buffered + leased + acknowledged + dropped (G3).
* Building it changes nothing and waits for nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from msgspec import to_builtins

from orchestrator.core.ledger.groups import DropCount
from orchestrator.core.ledger.ledger import Ledger
from orchestrator.core.ledger.source_state import SourceState
from orchestrator.core.mixture.mixer import Mixer
from orchestrator.core.mixture.outlook import Finished
from orchestrator.engines import EngineStatistics
from orchestrator.production.group_source import ProducerStatistics
from orchestrator.rewards import RewardStatistics

from .headline import headline
from .weight_in_force import weight_in_force

__all__ = ["RunFacts", "build_status"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """The facts of one moment that the status is built from.

    ``cause`` says why no batch is formed (``None``: one can be). ``loop`` says how the event loop was held up
    (:class:`~orchestrator.concurrency.loop_watch.LoopStatistics`). ``held`` maps each lease to the pid that holds it,
    and for how many seconds. ``connections`` lists the clients. ``state`` has the counts of the state store,
    ``archive`` those of the archive (``None``: there is none), ``sinks`` those of the metrics sinks. ``problems``
    lists the damage found at startup. ``events`` are the last log lines, ``history`` the figures of the last steps
    (:func:`~orchestrator.status.history.step_point`).
    """

    time_s: float
    cause: Mapping[str, Any] | None

    run: Mapping[str, Any]
    ledger: Ledger
    mixer: Mixer
    producers: Mapping[str, ProducerStatistics]
    rewards: Mapping[str, RewardStatistics]
    engines: Sequence[EngineStatistics]
    generation: Mapping[str, Any]
    starvation: Mapping[str, Any]
    loop: Mapping[str, Any]
    held: Mapping[str, tuple[int, float]]
    connections: Sequence[Mapping[str, Any]]
    state: Mapping[str, Any]
    archive: Mapping[str, Any] | None
    sinks: Sequence[Mapping[str, Any]]
    problems: Sequence[str]
    events: Sequence[Mapping[str, Any]]
    history: Sequence[Mapping[str, Any]]


def build_status(facts: RunFacts) -> dict[str, Any]:
    """The status object."""
    ledger, mixer = facts.ledger, facts.mixer
    plan = mixer.plan()
    leased = Counter(group.source for _, share in ledger.leases.open_shares() for group in share.groups)
    status = {
        "time": facts.time_s,
        "run": dict(facts.run),
        "step": ledger.step,
        "policy_version": ledger.policy_version,
        "is_finished": isinstance(mixer.outlook(), Finished),
        "cause": facts.cause,
        "next_group_index": ledger.next_group,
        "sources": {name: _source(facts, state, leased[name]) for name, state in ledger.sources.items()},
        "retired": {name: _account(state, leased[name]) for name, state in ledger.retired.items()},
        "plan": [{"step": b.step, "weights": dict(b.shares), "counts": dict(b.counts)} for b in plan],
        "leases": _leases(facts),
        "engines": [to_builtins(engine) for engine in facts.engines],
        "generation": dict(facts.generation),
        "starvation": dict(facts.starvation),
        "loop": dict(facts.loop),
        "connections": list(facts.connections),
        "state": dict(facts.state),
        "archive": facts.archive,
        "sinks": list(facts.sinks),
        "problems": list(facts.problems),
        "events": list(facts.events),
        "history": list(facts.history),
    }
    return status | {"headline": headline(status)}


def _source(facts: RunFacts, state: SourceState, leased: int) -> dict[str, Any]:
    demand = facts.mixer.demand(state.name)
    return {
        "weight": weight_in_force(facts.mixer, facts.ledger, state),
        "stats": to_builtins(facts.ledger.statistics(state.name)),
        "paused": state.paused,
        "exhausted": state.is_exhausted,
        "carry": state.carry,
        "debt": state.debt,
        "cursor": {"epoch": state.epoch, "position": state.position, "prompts": state.rows, "rerun": len(state.rerun)},
        **_account(state, leased),
        "kept": {"samples": state.kept_samples, "mean_tokens": state.kept_tokens / max(1, state.kept_samples)},
        "handed_out": state.handed_out,
        "overtakings": state.overtakings,
        "response_len": state.lengths.report(state.handed_out_lengths),
        "partial_groups": sum(1 for launched in state.in_flight.values() if launched.partials),
        "buffered_bytes": state.ready_bytes,
        "wanted": demand.wanted,
        "next_count": demand.next_count,
        "bound": demand.bound,
        "bound_by": demand.bound_by,
        "producer": to_builtins(facts.producers[state.name]),
        "reward": to_builtins(facts.rewards[state.name]),
    }


def _account(state: SourceState, leased: int) -> dict[str, Any]:
    """Where every group is that the source has launched."""
    return {
        "groups": {
            "launched": state.launched,
            "in_flight": len(state.in_flight),
            "buffered": len(state.ready),
            "leased": leased,
            "acknowledged": state.acknowledged,
            "dropped": sum(count.groups for count in state.dropped.values()),
        },
        "dropped": {reason: _drop(count) for reason, count in state.dropped.items()},
    }


def _drop(count: DropCount) -> dict[str, Any]:
    return {
        "groups": count.groups,
        "samples": count.samples,
        "mean_tokens": count.tokens / max(1, count.samples),
        "longest_tokens": count.longest,
    }


def _leases(facts: RunFacts) -> list[dict[str, Any]]:
    leases = []
    for batch, share in facts.ledger.leases.open_shares():
        lease = facts.ledger.leases.name(batch, share.rank)
        pid, held_s = facts.held.get(lease, (None, None))
        leases.append(
            {
                "lease": lease,
                "step": batch.step,
                "rank": share.rank,
                "world_size": batch.world_size,
                "groups": len(share.groups),
                "held_by_pid": pid,
                "held_s": held_s,
            }
        )
    return leases
