"""Why a batch is late, in one sentence with figures (G8).

Invariants:

* Every wait for a batch has a cause here; "unknown" is not one of them.
* The sentence names the source, how many groups it lacks, and what would help. ``kind`` says the same in one word. It
  does not change while the cause is the same, so the log reports each cause once.
* Causes that concern the whole run come before those of one source (``source_cause``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from orchestrator.core.ledger.ledger import Ledger
from orchestrator.core.mixture.outlook import Demand, Shortage
from orchestrator.engines import EngineStatistics
from orchestrator.production.group_source import ProducerStatistics
from orchestrator.rewards import RewardStatistics

from .source_cause import AVAILABLE, why_lacking

__all__ = ["Facts", "explain"]


HELP: Final = {
    "paused": " (orchestrator resume SOURCE)",
    "weight 0": " (orchestrator set-weight SOURCE WEIGHT)",
}

KINDS: Final = {"paused": "paused", "exhausted": "exhausted", "weight 0": "of_weight_0"}
"""The ``kind`` of a source that takes no part, by the reason as people read it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """The facts of one moment that a cause is derived from.

    ``demands``, ``producers`` and ``rewards`` are by source; so are ``weights``, the raw ones of the next step.
    ``paused_by`` describes a pause of generation (``None``: there is none). ``is_draining``: launching has stopped for
    good. ``waiting_requests`` wait for a slot at an engine. ``disk_fault`` says what is wrong with the disk, and
    ``unwritten_bytes`` wait for it.
    """

    ledger: Ledger
    demands: Mapping[str, Demand]
    producers: Mapping[str, ProducerStatistics]
    rewards: Mapping[str, RewardStatistics]
    weights: Mapping[str, float]
    engines: Sequence[EngineStatistics]
    paused_by: str | None
    is_draining: bool
    waiting_requests: int
    disk_fault: str | None
    unwritten_bytes: int


def explain(facts: Facts, *, waiting: str | None, shortage: Shortage | None) -> dict[str, Any]:
    """The cause as ``{"sentence", "kind", "sources": [{"source", "lacks", "needs", "kind", "why"}]}``.

    Args:
        facts: of the run.
        waiting: a reason given by the handout (the trainer holds its leases, a rank lags behind).
        shortage: what the sources lack.
    """
    if facts.disk_fault is not None:
        return _cause("disk", f"the state cannot be written: {facts.disk_fault}")
    if waiting is not None:
        return _cause("trainer", waiting)
    if shortage is None:
        return _cause("none", "a batch can be formed")
    if not shortage.lacks:
        return _no_weight(facts, shortage.step)
    general = _general(facts)
    sources = []
    for lack in shortage.lacks:
        kind, why = general or why_lacking(
            lack,
            facts.ledger.source(lack.source),
            facts.demands[lack.source],
            facts.producers[lack.source],
            facts.rewards[lack.source],
            engines=facts.engines,
            waiting_requests=facts.waiting_requests,
            unwritten_bytes=facts.unwritten_bytes,
        )
        lacks = lack.needed - lack.takeable
        sources.append({"source": lack.source, "lacks": lacks, "needs": lack.needed, "kind": kind, "why": why})
    sentence = _sentence(shortage.step, sources, None if general is None else general[1])
    if shortage.standing_in:
        sentence += f"; {shortage.standing_in}"
    return {"sentence": sentence, "kind": "sources" if general is None else general[0], "sources": sources}


def _cause(kind: str, sentence: str) -> dict[str, Any]:
    return {"sentence": sentence, "kind": kind, "sources": []}


def _no_weight(facts: Facts, step: int) -> dict[str, Any]:
    """No source takes part: each is paused, exhausted, or has weight 0."""
    why: dict[str, list[str]] = {what: [] for what in KINDS}
    for name, state in facts.ledger.sources.items():
        if state.paused:
            why["paused"].append(name)
        elif state.is_exhausted:
            why["exhausted"].append(name)
        elif not facts.weights.get(name):
            why["weight 0"].append(name)
    parts = [f"{what}: {', '.join(names)}{HELP.get(what, '')}" for what, names in why.items() if names]
    sentence = "; ".join([f"step {step}: no source that can give groups has a weight above 0", *parts])
    sources = [
        {"source": name, "lacks": 0, "needs": 0, "kind": KINDS[what], "why": what}
        for what, names in why.items()
        for name in names
    ]
    return {"sentence": sentence, "kind": "no_weight", "sources": sources}


def _general(facts: Facts) -> tuple[str, str] | None:
    """A cause that concerns all sources alike."""
    if facts.is_draining:
        return "draining", "the daemon is draining and launches nothing new"
    if facts.paused_by is not None:
        return "paused", f"generation is paused by pause_generation {facts.paused_by}; continue_generation ends it"
    if not facts.engines:
        return "engines", "there are no engines: add one with `orchestrator engines add`"
    if all(engine.state not in AVAILABLE for engine in facts.engines):
        none = "no engine" if len(facts.engines) == 1 else f"none of {len(facts.engines)} engines"
        return "engines", f"{none} is available: {'; '.join(map(_engine, facts.engines))}"
    return None


def _engine(engine: EngineStatistics) -> str:
    if engine.state == "outdated":
        why = "it may hold old parameters: call set_policy_version or update_weights"
    elif engine.state == "draining":
        why = f"orchestrator engines resume {engine.name}"
    else:
        why = engine.last_error or ""
    return f"{engine.name} is {engine.state}" + (f" ({why})" if why else "")


def _sentence(step: int, sources: Iterable[Mapping[str, Any]], general: str | None) -> str:
    lacking = [f"{entry['source']} lacks {entry['lacks']} of {entry['needs']} groups" for entry in sources]
    if general is not None:
        return f"step {step}: {', '.join(lacking)}, because {general}"
    whys = [f"{text} ({entry['why']})" for text, entry in zip(lacking, sources, strict=True)]
    return f"step {step}: {', '.join(whys)}"
