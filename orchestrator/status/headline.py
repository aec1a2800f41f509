"""The state of the run in a sentence or two: the first thing that the page, ``top`` and ``status`` show.

Invariants:

* A pure function of a status. Whoever displays it adds nothing.
* ``level`` says how urgent it is. ``late``: the trainer has waited longer than a moment. ``waiting``: the next batch is
  not ready, or something keeps the run from continuing. ``good``: all is well, also while the trainer works on a batch
  and the next one only needs time. ``quiet``: the run has ended.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

__all__ = ["headline"]

MOMENT_S: Final = 2.0
"""A batch is late when the trainer has waited for it longer than this."""

NOTHING_WRONG: Final = frozenset({"generation", "scoring", "slots"})
"""Causes of a source that pass without help."""


def headline(status: Mapping[str, Any]) -> dict[str, str]:
    """``{"level", "text"}`` of a status as :func:`~orchestrator.status.report.build_status` makes it."""
    if status["is_finished"] and not status["leases"]:
        return _say("quiet", f"The run is finished after {status['step']} batches.")
    cause, waits = status["cause"], status["starvation"]
    if cause is not None and waits["waiting"]:
        waited = waits["waiting_s"] or 0.0
        if cause["kind"] == "trainer":
            return _say("waiting", f"No batch for now. {_sentence(cause)}")
        late = f"The trainer has been waiting for {_seconds(waited)}." if waited else "The trainer is waiting."
        return _say("late" if waited > MOMENT_S else "waiting", f"{late} {_sentence(cause)}")
    if status["state"]["fault"]:
        return _say("late", f"The state cannot be written: {status['state']['fault']}")
    if status["generation"]["draining"]:
        return _say("waiting", "Drained: nothing new is launched. Finished groups are still handed out.")
    if cause is not None:
        level = "good" if _is_busy(status) and _only_takes_time(cause) else "waiting"
        return _say(level, f"{_trainer(status)} The next batch is not ready. {_sentence(cause)}")
    if status["is_finished"]:
        return _say("good", f"{_trainer(status)} This is the end of the run.")
    return _say("good", f"{_trainer(status)} The next batch is ready.")


def _sentence(cause: Mapping[str, Any]) -> str:
    text: str = cause["sentence"]
    return text[:1].upper() + text[1:]


def _say(level: str, text: str) -> dict[str, str]:
    return {"level": level, "text": text}


def _is_busy(status: Mapping[str, Any]) -> bool:
    """Whether a trainer is working on a batch."""
    return any(lease["held_s"] is not None for lease in status["leases"])


def _only_takes_time(cause: Mapping[str, Any]) -> bool:
    """Whether the trainer has paused generation for an update, or every source that lacks groups is generating them."""
    if cause["kind"] == "paused":
        return True
    return cause["kind"] == "sources" and all(entry["kind"] in NOTHING_WRONG for entry in cause["sources"])


def _trainer(status: Mapping[str, Any]) -> str:
    """What the trainer is doing, as far as the leases tell."""
    held = [lease for lease in status["leases"] if lease["held_s"] is not None]
    if held:
        oldest = max(held, key=lambda lease: lease["held_s"])
        return f"The trainer has been working on step {oldest['step']} for {_seconds(oldest['held_s'])}."
    if status["leases"]:
        step = status["leases"][0]["step"]
        return f"No trainer holds step {step}; it is not acknowledged and will be handed out again."
    return "No trainer holds a batch."


def _seconds(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
