"""The durable facts of sources that came or went at run time.

Invariants:

* A part of the ledger: it changes by events alone.
* The config file wins where it changed: what was done at run time to a source ends when the file says something else of
  a source of that name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .events import AddedSource, SourcesChanged

__all__ = ["SourceChanges"]


@dataclass(slots=True)
class SourceChanges:
    """See the module's invariants.

    ``added``: by name. ``removed``: by name what the file said of the source at that time.
    """

    added: dict[str, AddedSource] = field(default_factory=dict)
    removed: dict[str, dict[str, Any]] = field(default_factory=dict)

    def apply(self, event: SourcesChanged) -> None:
        """Change as the event says."""
        for name in event.undone:
            self.added.pop(name, None)
            self.removed.pop(name, None)
        self.added.update(event.added)
        self.removed.update(event.removed)

    def outdated(self, in_file: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
        """The names for which the file says something else by now, and how to say it to a person.

        Args:
            in_file: what the file says of each source, by name.
        """
        found = {
            name: f"source {name}, which was added at run time, is replaced by that of the config file"
            for name in self.added
            if name in in_file
        }
        for name, options in self.removed.items():
            if in_file.get(name) != options:
                found[name] = (
                    f"source {name} was removed at run time. This no longer applies, because the config file changed"
                )
        return found

    def snapshot(self) -> dict[str, Any]:
        """As JSON."""
        return {"added": dict(self.added), "removed": dict(self.removed)}

    def load(self, data: Mapping[str, Any]) -> None:
        """Become what ``snapshot`` described; nothing, where an older version wrote none."""
        self.added = {name: AddedSource(**added) for name, added in data.get("added", {}).items()}
        self.removed = dict(data.get("removed", {}))
