"""The config in force, and how another one takes its place while the daemon runs.

Invariants:

* What the new one needs is opened before anything changes; up to there any error leaves everything as it was.
* A source whose own part is the same goes on undisturbed; the others are parked, and go on with what was in flight.
* Sources that come and go are recorded, with what was done to them at run time, in one event, before anything is
  produced for them (``source_changes``, ``source_roster``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import anyio

from orchestrator.config import Config
from orchestrator.core.ledger.events import AddedSource, SourceFacts, SourcesChanged
from orchestrator.core.weights.forms import parse_weight
from orchestrator.daemon.source_lines import SourceLine, SourceLines
from orchestrator.errors import OrchestratorError
from orchestrator.production.producers import Producers
from orchestrator.prompts import PromptSource
from orchestrator.rewards import Reward

from .engines import EngineControl
from .run import RunControl

__all__ = ["RunningConfig"]

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


class RunningConfig:
    """See the module's invariants.

    Args:
        config: in force now.
        makers: what builds the lines.
        lines: of all sources, by name; changed in place.
        production: the producers.
        control: for the weights.
        engines: the engines' side.
        on_config: told of the config in force.
    """

    def __init__(
        self,
        config: Config,
        *,
        makers: SourceLines,
        lines: dict[str, SourceLine],
        production: Producers,
        control: RunControl,
        engines: EngineControl,
        on_config: Callable[[Config], None],
    ) -> None:
        self.config = config
        self._makers = makers
        self._lines = lines
        self._production = production
        self._control = control
        self._engines = engines
        self._on_config = on_config

    async def become(
        self,
        config: Config,
        rows: dict[str, int],
        *,
        added: dict[str, AddedSource] | None = None,
        removed: dict[str, dict[str, Any]] | None = None,
        undone: list[str] | None = None,
    ) -> None:
        """Have this config in force.

        Args:
            config: checked wholly.
            rows: how many prompts each source has.
            added: sources that come at run time.
            removed: sources of the file that go at run time, with what the file says of them.
            undone: names for which neither holds any more.

        Raises:
            BadRequest: an engine cannot be used; all is as it was.
            OrchestratorError: prompts or a reward cannot be opened; all is as it was.
            StateError: what is in flight could not be parked; all is as it was but the engines.
        """
        staged = _Staged()
        try:
            await self._stage(config, rows, staged)
            with anyio.CancelScope(shield=True):
                await self._engines.reconfigure(config)
                facts = self._facts(config, staged)
                change = SourcesChanged(facts, added=added or {}, removed=removed or {}, undone=undone or [])
                await self._take_over(config, staged, change)
        except OrchestratorError:
            await staged.aclose()
            raise
        self.config = config
        self._on_config(config)

    async def _stage(self, config: Config, rows: dict[str, int], staged: _Staged) -> None:
        """Open what the sources need that are new, or have changed."""
        for source in config.data_sources:
            if self._is_same(config, source.name, rows[source.name]):
                continue
            staged.prompts[source.name] = await source.prompts.open(name=source.name, seed=config.run.seed)
            staged.rewards[source.name] = self._makers.reward(config, source.name)

    def _is_same(self, config: Config, name: str, rows: int) -> bool:
        """Whether nothing has changed that a source's producer, or what stands behind it, is built from."""
        old = self.config
        if name not in self._lines or self._makers.store.ledger.source(name).rows != rows:
            return False
        return (
            _own(old, name) == _own(config, name)
            and old.dynamic_sampling_filter == config.dynamic_sampling_filter
            and old.logprobs_kind == config.logprobs_kind
        )

    async def _take_over(self, config: Config, staged: _Staged, change: SourcesChanged) -> None:
        changed = [*staged.prompts, *(name for name in self._lines if name not in config.source_names)]
        await self._production.park(changed)
        try:
            self._record(change)
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

    def _facts(self, config: Config, staged: _Staged) -> list[SourceFacts]:
        facts = []
        for source in config.data_sources:
            prompts = staged.prompts.get(source.name) or self._lines[source.name].prompts
            facts.append(SourceFacts(source.name, len(prompts), prompts.epochs, source.renamed_from))
        return facts

    def _record(self, change: SourcesChanged) -> None:
        before = [(name, state.rows, state.epochs) for name, state in self._makers.store.ledger.sources.items()]
        is_same = before == [(fact.name, fact.rows, fact.epochs) for fact in change.sources]
        if not is_same or change.added or change.removed or change.undone:
            self._makers.store.record(change)

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
