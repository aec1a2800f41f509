"""A line for each record of the state log: what has changed durably, for whoever asks later what happened when.

Invariants:

* Every kind of event has its line, those that are yet to come as well: ``event.action`` is the event's tag, ``state``
  holds its facts. A source or engine that it is about is named as in every other line.
* At ``info`` what happens a few times a batch at most; launched and dropped groups, which lines of steps count, at
  ``debug``, and where these are not asked for they cost a comparison.
* Long lists (group indices, lengths) stay in the state.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from orchestrator.core.ledger.events import Dropped, Event, Launched

__all__ = ["JOURNAL", "journal_line", "level_of"]

JOURNAL: Final = "journal"
"""``event.dataset`` of these lines."""

_LONG: Final = frozenset({"shares", "lengths", "rewards"})


def level_of(event: Event) -> int:
    """At which level the line of an event is written."""
    return logging.DEBUG if isinstance(event, Launched | Dropped) else logging.INFO


def journal_line(event: Event) -> dict[str, Any]:
    """The line of an event that was recorded, as a logger's event dictionary."""
    facts: dict[str, Any] = {key: value for key, value in msgspec.to_builtins(event).items() if key not in _LONG}
    action = facts.pop("event")
    names = {key: facts.pop(key) for key in ("source", "engine") if isinstance(facts.get(key), str)}
    told = [f"{key} {value}" for key, value in {**names, **facts}.items() if not isinstance(value, Mapping | list)]
    message = f"recorded: {action} ({', '.join(told)})"
    return {"event": message, "dataset": JOURNAL, "action": action, "state": facts, **names}
