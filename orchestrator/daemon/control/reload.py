"""The config file of a running daemon, read again.

Invariants:

* Any error, in the file or in what it names, leaves everything as it was.
* What a daemon reads only when it starts stays as it was, and is said with the reason (``config.differences.FIXED``).
* What was done to sources at run time stays, where the file agrees.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import anyio.to_thread
from structlog.typing import FilteringBoundLogger

from orchestrator.config import Difference, LoadedConfig, differences, in_effect, read_config, with_fixed
from orchestrator.core.ledger.ledger import Ledger
from orchestrator.errors import BadRequest, ConfigError, ConfigRefused

from .checked_changes import CheckedChanges, as_request
from .running_config import RunningConfig

__all__ = ["Reloader"]


class Reloader:
    """Implements :class:`~orchestrator.consumer.methods.sources.ReloadControl`; see the module's invariants.

    Args:
        file: the config file; ``None``: this daemon has none.
        running: the config in force.
        changes: what every change goes through.
        ledger: for what was done to sources at run time.
        directory: what relative paths of added sources are relative to.
        log: for what happened.
    """

    def __init__(
        self,
        *,
        file: Path | None,
        running: RunningConfig,
        changes: CheckedChanges,
        ledger: Ledger,
        directory: Path,
        log: FilteringBoundLogger,
    ) -> None:
        self._file = file
        self._running = running
        self._changes = changes
        self._ledger = ledger
        self._directory = directory
        self._log = log

    async def reload(self) -> list[dict[str, Any]]:
        """Read the config file again and take it over; returns what differs from the config before.

        Raises:
            BadRequest: another change is under way, or there is no file.
            ConfigRefused: the file has problems, or something that it names cannot be used; all is as it was.
            ShuttingDown: the daemon is draining.
            StateError: what is in flight could not be parked; all is as it was but the engines.
        """
        with self._changes.change("the changed config"):
            found = await self._reload()
        for difference in found:
            if difference.is_live:
                self._log.info(f"the config changed: {difference}", action="reloaded")
            else:
                self._log.warning(f"{difference}. This needs a restart, because {difference.reason}")
        if not found:
            self._log.info("reloaded the config: nothing changed")
        return [asdict(difference) for difference in found]

    async def _reload(self) -> list[Difference]:
        loaded = await self._read()
        done, directory = self._ledger.source_changes, self._directory
        in_file = with_fixed(self._running.in_file, loaded.config)
        try:
            config, outdated = in_effect(in_file, done, directory=directory)
            found = differences(self._running.config, in_effect(loaded.config, done, directory=directory)[0])
            is_as_file = config.source_names == in_file.source_names  # else places in the file would be wrong
            rows = await self._changes.examine(config, loaded.error if is_as_file else as_request)
            await self._running.become(config, rows, undone=list(outdated), in_file=in_file)
        except (BadRequest, ConfigError) as error:
            raise ConfigRefused(str(error)) from error
        for sentence in outdated.values():
            self._log.warning(sentence)
        return found

    async def _read(self) -> LoadedConfig:
        if self._file is None:
            raise BadRequest("this daemon has no config file to reload")
        try:
            return await anyio.to_thread.run_sync(read_config, self._file)
        except ConfigError as error:
            raise ConfigRefused(str(error)) from error
