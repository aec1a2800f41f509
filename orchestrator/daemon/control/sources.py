"""The sources of a running daemon: listed, added, removed, restored, without the config file.

Invariants:

* What is done here is in force again after a restart, until the file says something else of a source of that name.
* Any error leaves everything as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from structlog.typing import FilteringBoundLogger

from orchestrator.config import in_effect, parse_source, source_as_json, with_source, without_sources
from orchestrator.core.ledger.events import AddedSource, SourceFacts, SourcesChanged
from orchestrator.core.ledger.ledger import Ledger, SourceSize
from orchestrator.core.ledger.source_changes import SourceChanges
from orchestrator.errors import BadRequest, ForeignState
from orchestrator.state import StateStore

from .checked_changes import CheckedChanges, as_request
from .running_config import RunningConfig

__all__ = ["SourceControl", "settle_sources"]


class SourceControl:
    """Implements :class:`~orchestrator.consumer.methods.sources.SourceControl`; see the module's invariants.

    Args:
        running: the config in force.
        changes: what every change goes through.
        ledger: for what was done.
        directory: what relative paths of added sources, and dotted paths, are relative to.
        log: for what happened.
    """

    def __init__(
        self,
        *,
        running: RunningConfig,
        changes: CheckedChanges,
        ledger: Ledger,
        directory: Path,
        log: FilteringBoundLogger,
    ) -> None:
        self._running = running
        self._changes = changes
        self._ledger = ledger
        self._directory = directory
        self._log = log

    def sources(self) -> list[dict[str, Any]]:
        """Every source with its weight and cap, and whether the file has it; those removed at run time too."""
        config, done = self._running.config, self._ledger.source_changes
        caps = config.data_source_reward_caps or (None,) * len(config.data_sources)
        parts = zip(config.data_sources, config.data_source_weights, caps, strict=True)
        known = [
            {"source": source_as_json(source), "weight": weight, "cap": cap}
            | {"state": "added" if source.name in done.added else "in_file"}
            for source, weight, cap in parts
        ]
        return known + [{"source": options, "state": "removed"} for options in done.removed.values()]

    async def add(self, raw: Mapping[str, Any], weight: float | str, cap: float | str | None) -> str:
        """One more source, as a config file would say it; returns its name.

        Raises:
            BadRequest: it would be wrong in a config file too, its name is taken, or another change is under way.
            ShuttingDown: the daemon is draining.
            StateError: what is in flight could not be parked; all is as it was.
        """
        with self._changes.change("adding a source"):
            source = parse_source(raw, weight, cap, directory=self._directory)
            if source.name in (*self._running.config.source_names, *self._running.in_file.source_names):
                raise BadRequest(
                    f"there is already a source {source.name!r}, or the config file has one; see `sources`"
                )
            config = with_source(self._running.config, source, weight, cap)
            rows = await self._changes.examine(config, as_request)
            added = AddedSource(source_as_json(source), weight, cap, rows[source.name], source.prompts.epochs)
            await self._running.become(config, rows, added={source.name: added})
            self._log.info(f"added source {source.name} with weight {weight!r}")
        return source.name

    async def remove(self, name: str) -> None:
        """Let a source go; what of it is in flight and buffered is dropped and counted.

        Raises:
            SourceUnknown: no such source.
            BadRequest: it is the last one, or the others never have a weight above 0, or another change is under way.
            ShuttingDown, StateError: as :meth:`add`.
        """
        with self._changes.change("removing a source"):
            self._ledger.source(name)
            if len(self._running.config.data_sources) == 1:
                raise BadRequest(f"{name} is the only source: add another one first, or stop the daemon")
            config, in_file = without_sources(self._running.config, {name}), self._running.in_file
            rows = await self._changes.examine(config, as_request)
            if name in in_file.source_names:
                await self._running.become(config, rows, removed={name: source_as_json(in_file.source(name))})
            else:
                await self._running.become(config, rows, undone=[name])
            self._log.info(f"removed source {name}")

    async def restore(self, name: str) -> None:
        """Have a source of the file again that was removed at run time.

        Raises:
            BadRequest: none of that name was removed, or another change is under way.
            ShuttingDown, StateError: as :meth:`add`.
        """
        with self._changes.change("restoring a source"):
            done = self._ledger.source_changes
            if name not in done.removed:
                raise BadRequest(f"no source {name!r} was removed at run time")
            rest = SourceChanges(dict(done.added), {key: v for key, v in done.removed.items() if key != name})
            config, _ = in_effect(self._running.in_file, rest, directory=self._directory)
            await self._running.become(config, await self._changes.examine(config, as_request), undone=[name])
            self._log.info(f"restored source {name}")


def settle_sources(
    store: StateStore, found: Mapping[str, SourceSize], *, undone: list[str], allow_source_changes: bool
) -> None:
    """Bring the state's facts in line at a start, where the file or a prompt file has changed since.

    The prompts of a source that was added at run time are read only when the state has told of it.

    Args:
        store: the recovered state.
        found: the prompts of every source as they are now.
        undone: names for which what was done at run time holds no more.
        allow_source_changes: take other prompts than before.

    Raises:
        ForeignState: a source has other prompts than before, and that is not allowed.
    """
    other = [name for name, size in found.items() if size.rows != store.ledger.sources[name].rows]
    if other and not allow_source_changes:
        raise ForeignState(
            f"source {other[0]} was added at run time with {store.ledger.sources[other[0]].rows} prompts, but now has"
            f" {found[other[0]].rows}: restore its prompt file, or start with --allow-source-changes"
        )
    if other or undone:
        facts = [SourceFacts(name, size.rows, size.epochs) for name, size in found.items()]
        store.record(SourcesChanged(facts, undone=undone))
