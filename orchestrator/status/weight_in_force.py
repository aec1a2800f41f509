"""The weight of a source that is in force, and why: one object for the status, the command line and the page."""

from __future__ import annotations

from typing import Any

from orchestrator.core.ledger.ledger import Ledger
from orchestrator.core.ledger.source_state import SourceState
from orchestrator.core.mixture.mixer import Mixer

__all__ = ["weight_in_force"]


def weight_in_force(mixer: Mixer, ledger: Ledger, state: SourceState) -> dict[str, Any]:
    """``{"text", "kind", "set_at_run_time", "value", "share", "why"}``.

    ``value`` is the weight for the next batch; ``share`` is the same, normalised over the sources that take part. Both
    are ``None`` while no batch can be planned. ``why`` is a sentence.
    """
    weight = mixer.table.weight(state.name)
    plan = mixer.plan()
    return {
        "text": weight.text,
        "kind": weight.kind,
        "set_at_run_time": state.weight_override is not None,
        "value": plan[0].raw[state.name] if plan else None,
        "share": plan[0].shares[state.name] if plan else None,
        "why": "; ".join(_reasons(mixer, ledger, state)),
    }


def _reasons(mixer: Mixer, ledger: Ledger, state: SourceState) -> list[str]:
    reasons = ["from the config file"]
    if state.weight_override is not None:
        reasons = [f"set at run time; the config file says {state.weight_in_file}"]
    if mixer.table.weight(state.name).is_adaptive:
        stats = ledger.statistics(state.name)
        seen = f"pass rate {stats.pass_rate:.2f}, signal {stats.signal:.2f}, learnability {stats.learnability:.3f}"
        reasons.append(f"{seen} over {stats.groups} groups" if stats.groups else "none of its groups is scored yet")
    if state.paused:
        reasons.append("paused")
    if state.is_exhausted:
        reasons.append("it has no prompts left")
    plan = mixer.plan()
    reasons += [text for text in (plan[0].warnings if plan else ()) if text.startswith(f"weight of {state.name} ")]
    return reasons
