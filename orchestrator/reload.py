"""A changed config, taken over by a running daemon.

Invariants:

* The changed config is read and checked wholly first, as ``check`` does it; prompts, rewards and engines that it needs
  are opened then. Up to there any error leaves everything as it was.
* A source whose own part is the same goes on undisturbed; the others are parked, and go on with what was in flight.
* What a daemon reads only when it starts stays as it was, and is said.
* Sources that come and go are recorded before anything is produced for them (``source_changes``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import anyio
import anyio.to_thread
from structlog.typing import FilteringBoundLogger

from .config import Config, Difference, differences, prompt_options, with_fixed
from .config.examine import examine
from .config.load import read_config
from .control import Control
from .engine_control import EngineControl
from .errors import BadRequest, ConfigError, ConfigRefused, OrchestratorError, ShuttingDown
from .events import SourceFacts, SourcesChanged
from .production import Production
from .prompts import PromptSource, open_prompts
from .rewards import Reward
from .source_lines import SourceLine, SourceLines
from .weights import parse_weight

__all__ = ["Reloader"]


LINE_KEYS: Final = (
    "rollout_batch_size",
    "n_samples_per_prompt",
    "failed_sample",
    "mask_offpolicy_in_partial_rollout",
    "max_staleness",
)
"""The keys of ``rollout`` that producers and filters are given."""


@dataclass(slots=True)
class _Staged:
    """What is open already and not yet in use."""

    prompts: dict[str, PromptSource] = field(default_factory=dict)
    rewards: dict[str, Reward] = field(default_factory=dict)

    async def aclose(self) -> None:
        for reward in self.rewards.values():
            await reward.aclose()
        for prompts in self.prompts.values():
            await prompts.aclose()


class Reloader:
    """See the module's invariants.

    Args:
        file: the config file; ``None``: this daemon has none.
        config: in force now.
        makers: what builds the lines.
        lines: of all sources, by name; changed in place.
        production: the producers.
        control: for the weights.
        engines: the engines' side.
        on_config: told of the config in force.
        log: for what happened.
    """

    def __init__(
        self,
        *,
        file: Path | None,
        config: Config,
        makers: SourceLines,
        lines: dict[str, SourceLine],
        production: Production,
        control: Control,
        engines: EngineControl,
        on_config: Callable[[Config], None],
        log: FilteringBoundLogger,
    ) -> None:
        self._file = file
        self._config = config
        self._makers = makers
        self._lines = lines
        self._production = production
        self._control = control
        self._engines = engines
        self._on_config = on_config
        self._log = log
        self._is_reloading = False

    async def reload(self) -> list[dict[str, Any]]:
        """Read the config file again and take it over; returns what differs from the config before.

        Raises:
            BadRequest: a reload is under way, or there is no file.
            ConfigRefused: the file has problems, or something that it names cannot be used; all is as it was.
            ShuttingDown: the daemon is draining.
            StateError: what is in flight could not be parked; all is as it was but the engines.
        """
        if self._is_reloading:
            raise BadRequest("the config is being reloaded at this moment; ask again when that is over")
        if self._control.is_draining:
            raise ShuttingDown("the daemon is draining: it reads the config when it is started again")
        self._is_reloading = True
        try:
            found = await self._reload()
        except OrchestratorError as error:
            self._log.error(f"the config stays as it was: {error}")
            raise
        finally:
            self._is_reloading = False
        self._report(found)
        return [asdict(difference) for difference in found]

    def _report(self, found: list[Difference]) -> None:
        for difference in found:
            if difference.is_live:
                self._log.info(f"the config has changed: {difference}")
            else:
                self._log.warning(f"{difference}: that takes effect at the next start")
        if not found:
            self._log.info("the config was read again: nothing in it has changed")

    async def _reload(self) -> list[Difference]:
        file, rows = await self._read()
        found, config = differences(self._config, file), with_fixed(self._config, file)
        staged = _Staged()
        try:
            await self._stage(config, rows, staged)
            with anyio.CancelScope(shield=True):
                await self._engines.reconfigure(config)
                await self._take_over(config, staged)
        except OrchestratorError as error:
            await staged.aclose()
            if isinstance(error, BadRequest):
                raise ConfigRefused(str(error)) from error
            raise
        self._config = config
        self._on_config(config)
        return found

    async def _read(self) -> tuple[Config, dict[str, int]]:
        """The file's config, checked wholly, and how many prompts each source has."""
        if self._file is None:
            raise BadRequest("this daemon has no config file to read again")
        directory = self._makers.directory
        try:
            loaded = await anyio.to_thread.run_sync(read_config, self._file)
            # A loop of its own: evaluating the weights of the coming steps takes a while.
            found = await anyio.to_thread.run_sync(
                partial(anyio.run, partial(examine, loaded.config, directory=directory))
            )
            if found.findings:
                raise loaded.error(found.findings)
        except ConfigError as error:
            raise ConfigRefused(str(error)) from error
        for warning in found.warnings:
            self._log.warning(warning)
        return loaded.config, found.prompts

    # -- sources -------------------------------------------------------------------------------------------------------

    async def _stage(self, config: Config, rows: dict[str, int], staged: _Staged) -> None:
        """Open what the sources need that are new, or have changed."""
        for source in config.data_sources:
            if self._is_same(config, source.name, rows[source.name]):
                continue
            staged.prompts[source.name] = await open_prompts(**prompt_options(source, seed=config.run.seed))
            staged.rewards[source.name] = self._makers.reward(config, source.name)

    def _is_same(self, config: Config, name: str, rows: int) -> bool:
        """Whether nothing has changed that a source's producer, or what stands behind it, is built from."""
        old = self._config
        if name not in self._lines or self._makers.store.ledger.source(name).rows != rows:
            return False
        return (
            _own(old, name) == _own(config, name)
            and old.dynamic_sampling_filter == config.dynamic_sampling_filter
            and old.logprobs_kind == config.logprobs_kind
        )

    async def _take_over(self, config: Config, staged: _Staged) -> None:
        changed = [*staged.prompts, *(name for name in self._lines if name not in config.source_names)]
        await self._production.park(changed)
        try:
            self._record_sources(config, staged)
            self._reconfigure(config)
            old = [line for name in changed if (line := self._lines.pop(name, None)) is not None]
            for name in changed:
                self._exchange(config, name, staged)
        finally:
            self._production.start()
        for line in old:
            await line.aclose()
        await self._makers.store.written()
        await self._makers.store.snapshot()

    def _record_sources(self, config: Config, staged: _Staged) -> None:
        ledger = self._makers.store.ledger
        facts = []
        for source in config.data_sources:
            prompts = staged.prompts.get(source.name) or self._lines[source.name].prompts
            facts.append(SourceFacts(source.name, len(prompts), prompts.epochs, source.renamed_from))
        before = [(name, state.rows, state.epochs) for name, state in ledger.sources.items()]
        if before != [(fact.name, fact.rows, fact.epochs) for fact in facts]:
            self._makers.store.record(SourcesChanged(facts))

    def _reconfigure(self, config: Config) -> None:
        """Everything that concerns all sources, between two batches."""
        directory, names, rollout = self._makers.directory, config.source_names, config.rollout
        weights = [parse_weight(weight, directory=directory) for weight in config.data_source_weights]
        mixer = self._makers.mixer
        mixer.table.replace(names, weights)
        mixer.reconfigure(
            batch_size=rollout.rollout_batch_size,
            lookahead=rollout.lookahead,
            max_staleness=rollout.max_staleness,
            num_rollout=rollout.num_rollout,
            outstanding_bound=config.outstanding_bound,
            buffer_bounds={source.name: (source.buffer.groups, source.buffer.bytes) for source in config.data_sources},
        )
        self._makers.caps.replace(names, config.data_source_reward_caps, directory=directory)
        self._control.reconfigure(dict(zip(names, config.data_source_weights, strict=True)))
        self._makers.replan.notify()

    def _exchange(self, config: Config, name: str, staged: _Staged) -> None:
        if name in staged.prompts:
            line = self._makers.line(config, name, staged.prompts.pop(name), staged.rewards.pop(name))
            self._lines[name] = line
            self._production.put(name, line.producer)
        else:
            self._production.remove(name)


def _own(config: Config, name: str) -> tuple[Any, ...]:
    """What a source's line is built from, of what its own section and ``rollout`` say."""
    source, rollout = config.source(name), config.rollout
    groups = {key: getattr(rollout, key) for key in LINE_KEYS}
    return source.prompts, source.reward, config.sampling_of(name), groups
