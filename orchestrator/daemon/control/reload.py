"""Changes that a running daemon takes over: its config file read again, a source added or removed.

Invariants:

* What is to be in force is checked wholly first, as ``check`` does it; any error leaves everything as it was.
* One change at a time.
* What a daemon reads only when it starts stays as it was, and is said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
from structlog.typing import FilteringBoundLogger

from orchestrator.config import (
    Config,
    Difference,
    LoadedConfig,
    differences,
    in_effect,
    parse_source,
    read_config,
    source_as_json,
    with_fixed,
    with_source,
    without_sources,
)
from orchestrator.config.examine import examine
from orchestrator.config.text import Finding
from orchestrator.core.ledger.events import AddedSource
from orchestrator.core.ledger.ledger import Ledger
from orchestrator.core.ledger.source_changes import SourceChanges
from orchestrator.errors import BadRequest, ConfigError, ConfigRefused, OrchestratorError, ShuttingDown

from .run import RunControl
from .running_config import RunningConfig

__all__ = ["Reloader"]


class Reloader:
    """Implements :class:`~orchestrator.consumer.methods.sources.SourceControl`; see the module's invariants.

    Args:
        file: the config file; ``None``: this daemon has none.
        in_file: the config that was read from it.
        running: the config in force: the same, with what was done to its sources at run time.
        ledger: for what was done.
        control: for whether the daemon is draining.
        directory: what relative paths of added sources, and dotted paths, are relative to.
        log: for what happened.
    """

    def __init__(
        self,
        *,
        file: Path | None,
        in_file: Config,
        running: RunningConfig,
        ledger: Ledger,
        control: RunControl,
        directory: Path,
        log: FilteringBoundLogger,
    ) -> None:
        self._file = file
        self._in_file = in_file
        self._running = running
        self._ledger = ledger
        self._control = control
        self._directory = directory
        self._log = log
        self._is_changing = False

    @contextmanager
    def _changing(self, what: str) -> Iterator[None]:
        """One at a time; what it raises is logged."""
        if self._is_changing:
            raise BadRequest("the config is being changed at this moment; ask again when that is over")
        if self._control.is_draining:
            raise ShuttingDown("the daemon is draining; start it again first")
        self._is_changing = True
        try:
            yield
        except OrchestratorError as error:
            self._log.error(f"{what} was refused, everything stays as it was: {error}", action="reload_refused")
            raise
        finally:
            self._is_changing = False

    # -- the file ------------------------------------------------------------------------------------------------------

    async def reload(self) -> list[dict[str, Any]]:
        """Read the config file again and take it over; returns what differs from the config before.

        Raises:
            BadRequest: another change is under way, or there is no file.
            ConfigRefused: the file has problems, or something that it names cannot be used; all is as it was.
            ShuttingDown: the daemon is draining.
            StateError: what is in flight could not be parked; all is as it was but the engines.
        """
        with self._changing("the changed config"):
            found = await self._reload()
        for difference in found:
            if difference.is_live:
                self._log.info(f"the config has changed: {difference}", action="reloaded")
            else:
                self._log.warning(f"{difference}: that takes effect at the next start")
        if not found:
            self._log.info("the config was read again: nothing in it has changed")
        return [asdict(difference) for difference in found]

    async def _reload(self) -> list[Difference]:
        loaded = await self._read()
        changes, directory = self._ledger.source_changes, self._directory
        in_file = with_fixed(self._in_file, loaded.config)
        try:
            config, outdated = in_effect(in_file, changes, directory=directory)
            found = differences(self._running.config, in_effect(loaded.config, changes, directory=directory)[0])
            is_as_file = config.source_names == in_file.source_names  # else places in the file would be wrong
            rows = await self._examined(config, loaded.error if is_as_file else _as_request)
            await self._running.become(config, rows, undone=list(outdated))
        except (BadRequest, ConfigError) as error:
            raise ConfigRefused(str(error)) from error
        for sentence in outdated.values():
            self._log.warning(sentence)
        self._in_file = in_file
        return found

    async def _read(self) -> LoadedConfig:
        if self._file is None:
            raise BadRequest("this daemon has no config file to read again")
        try:
            return await anyio.to_thread.run_sync(read_config, self._file)
        except ConfigError as error:
            raise ConfigRefused(str(error)) from error

    async def _examined(
        self, config: Config, error: Callable[[Iterable[Finding]], OrchestratorError]
    ) -> dict[str, int]:
        """How many prompts each source has, once everything that the config names can be used."""
        # A loop of its own: evaluating the weights of the coming steps takes a while.
        look = partial(anyio.run, partial(examine, config, directory=self._directory))
        found = await anyio.to_thread.run_sync(look)
        if found.findings:
            raise error(found.findings)
        for warning in found.warnings:
            self._log.warning(warning)
        return found.prompts

    # -- sources at run time -------------------------------------------------------------------------------------------

    def sources(self) -> list[dict[str, Any]]:
        """Every source with its weight and cap, and whether the file has it; those removed at run time too."""
        config, changes = self._running.config, self._ledger.source_changes
        caps = config.data_source_reward_caps or (None,) * len(config.data_sources)
        parts = zip(config.data_sources, config.data_source_weights, caps, strict=True)
        known = [
            {"source": source_as_json(source), "weight": weight, "cap": cap}
            | {"state": "added" if source.name in changes.added else "in_file"}
            for source, weight, cap in parts
        ]
        return known + [{"source": options, "state": "removed"} for options in changes.removed.values()]

    async def add(self, raw: Mapping[str, Any], weight: float | str, cap: float | str | None) -> str:
        """One more source, as a config file would say it; returns its name.

        Raises:
            BadRequest: it would be wrong in a config file too, or its name is taken.
            ShuttingDown, StateError: as :meth:`reload`.
        """
        with self._changing("a source to be added"):
            source = parse_source(raw, weight, cap, directory=self._directory)
            if source.name in (*self._running.config.source_names, *self._in_file.source_names):
                raise BadRequest(f"there is a source {source.name!r} already, or the config file has it: see `sources`")
            config = with_source(self._running.config, source, weight, cap)
            rows = await self._examined(config, _as_request)
            added = AddedSource(source_as_json(source), weight, cap, rows[source.name], source.prompts.epochs)
            await self._running.become(config, rows, added={source.name: added})
            self._log.info(f"source {source.name} was added with weight {weight!r}")
        return source.name

    async def remove(self, name: str) -> None:
        """Let a source go; what of it is in flight and buffered is dropped and counted.

        Raises:
            SourceUnknown: no such source.
            BadRequest: it is the last one, or the others never have a weight above 0.
            ShuttingDown, StateError: as :meth:`reload`.
        """
        with self._changing("a source to be removed"):
            self._ledger.source(name)
            if len(self._running.config.data_sources) == 1:
                raise BadRequest(f"{name} is the only source: add another one first, or stop the daemon")
            config = without_sources(self._running.config, {name})
            rows = await self._examined(config, _as_request)
            if name in self._in_file.source_names:
                removed = {name: source_as_json(self._in_file.source(name))}
                await self._running.become(config, rows, removed=removed)
            else:
                await self._running.become(config, rows, undone=[name])
            self._log.info(f"source {name} was removed")

    async def restore(self, name: str) -> None:
        """Have a source of the file again that was removed at run time.

        Raises:
            BadRequest: none of that name was removed.
            ShuttingDown, StateError: as :meth:`reload`.
        """
        with self._changing("a source to be restored"):
            changes = self._ledger.source_changes
            if name not in changes.removed:
                raise BadRequest(f"no source {name!r} was removed at run time")
            rest = SourceChanges(dict(changes.added), {key: v for key, v in changes.removed.items() if key != name})
            config, _ = in_effect(self._in_file, rest, directory=self._directory)
            await self._running.become(config, await self._examined(config, _as_request), undone=[name])
            self._log.info(f"source {name} takes part again")


def _as_request(findings: Iterable[Finding]) -> OrchestratorError:
    return BadRequest("; ".join(finding.message for finding in findings))
