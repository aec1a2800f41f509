"""The durable facts of the engines: what was changed at run time, and which parameters each is known to hold.

Invariants:

* A part of the ledger: it changes by events alone, and never knows whether an engine is well.
* The config file wins where it changed: what was done at run time to an engine of the file ends when the file says
  something else of that engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .events import EngineAdded, EngineDrained, EngineRemoved, Event, ParametersHeld, VersionSet

__all__ = ["EngineChanges", "StartingEngines"]

Options = Mapping[str, Any]
"""What a config file says of one engine, as JSON."""


@dataclass(frozen=True, slots=True)
class StartingEngines:
    """The engines to start with.

    ``engines`` are their options by name, in order; ``draining`` the names of those that get no new requests;
    ``outdated`` the events that say that the file has changed since, with a sentence each.
    """

    engines: dict[str, dict[str, Any]]
    draining: set[str]
    outdated: list[tuple[Event, str]]


@dataclass(slots=True)
class EngineChanges:
    """See the module's invariants.

    ``parameters_path``: of the policy version in force, if known. ``held``: version and identity by engine. ``added``:
    options by name. ``removed``, ``draining``: by name the options that the file had at that time.
    """

    parameters_path: str | None = None
    held: dict[str, tuple[int | None, str | None]] = field(default_factory=dict)
    added: dict[str, dict[str, Any]] = field(default_factory=dict)
    removed: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    draining: dict[str, dict[str, Any] | None] = field(default_factory=dict)

    def apply(self, event: VersionSet | ParametersHeld | EngineAdded | EngineDrained | EngineRemoved) -> None:
        """Change as the event says."""
        match event:
            case VersionSet():
                self.parameters_path = event.path
            case ParametersHeld():
                self.held[event.engine] = (event.version, event.identity)
            case EngineAdded():
                self.added[event.engine] = event.options
                self.removed.pop(event.engine, None)
            case EngineDrained(is_draining=True):
                self.draining[event.engine] = event.options
            case EngineDrained():
                self.draining.pop(event.engine, None)
            case EngineRemoved():
                self._removed(event)

    def _removed(self, event: EngineRemoved) -> None:
        for known in (self.held, self.draining, self.added):
            known.pop(event.engine, None)
        if event.is_undone or event.options is None:
            self.removed.pop(event.engine, None)
        else:
            self.removed[event.engine] = event.options

    def starting(self, configured: Sequence[Options]) -> StartingEngines:
        """The engines of the file, and what was done to them at run time.

        Args:
            configured: what the file says of each engine, with its name.
        """
        in_file = {options["name"]: dict(options) for options in configured}
        engines, draining, outdated = dict(in_file), set(self.draining), list[tuple[Event, str]]()
        for name, options in self.removed.items():
            if name in in_file and in_file[name] == options:
                del engines[name]
            else:
                outdated.append((EngineRemoved(name, is_undone=True), _ENDS.format(name=name, what="removed")))
        for name, options in self.draining.items():
            if name in in_file and in_file[name] != options:
                draining.discard(name)
                outdated.append((EngineDrained(name, False), _ENDS.format(name=name, what="drained")))
        for name, options in self.added.items():
            if name in in_file:
                outdated.append(
                    (
                        EngineRemoved(name),
                        f"engine {name}, which was added at run time, is replaced by that of the config file",
                    )
                )
            else:
                engines[name] = options
        return StartingEngines(engines, draining & engines.keys(), outdated)

    def forget_parameters(self) -> None:
        """Nobody knows which parameters the engines hold."""
        self.parameters_path = None
        self.held.clear()

    def snapshot(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "weights_path": self.parameters_path,
            "held": {name: list(held) for name, held in self.held.items()},
            "added": self.added,
            "removed": self.removed,
            "draining": self.draining,
        }

    def load(self, data: Mapping[str, Any]) -> None:
        """Become what ``snapshot`` described; nothing, where an older version wrote none."""
        self.parameters_path = data.get("weights_path")
        self.held = {name: (version, identity) for name, (version, identity) in data.get("held", {}).items()}
        self.added = dict(data.get("added", {}))
        self.removed = dict(data.get("removed", {}))
        self.draining = dict(data.get("draining", {}))


_ENDS = "engine {name} was {what} at run time. This no longer applies, because the config file has changed it"
