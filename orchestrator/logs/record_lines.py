"""A log line for each record of the state log: what changed durably, and when.

Invariants:

* Every kind of event has its line, future kinds included: ``event.action`` is the event's tag, ``state`` holds its
  facts. The source or engine that it concerns is named as in every other line.
* Events that happen a few times a batch at most are logged at ``info``. Launched and dropped groups are logged at
  ``debug``, because the lines of steps count them; if that level is off, they cost one comparison.
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
    """The log level of an event's line."""
    return logging.DEBUG if isinstance(event, Launched | Dropped) else logging.INFO


def journal_line(event: Event) -> dict[str, Any]:
    """The line of a recorded event, as a logger's event dictionary."""
    facts: dict[str, Any] = {key: value for key, value in msgspec.to_builtins(event).items() if key not in _LONG}
    action = facts.pop("event")
    names = {key: facts.pop(key) for key in ("source", "engine") if isinstance(facts.get(key), str)}
    told = [f"{key} {value}" for key, value in {**names, **facts}.items() if not isinstance(value, Mapping | list)]
    message = f"recorded: {action} ({', '.join(told)})"
    return {"event": message, "dataset": JOURNAL, "action": action, "state": facts, **names}
