"""The config in force, and how another one takes its place while the daemon runs.

Invariants:

* What the new one needs is opened before anything changes; up to there any error leaves everything as it was.
* A source whose settings are the same goes on undisturbed; the others are parked, and go on with what was in flight.
* Sources that come and go are recorded, with what was done to them at run time, in one event, before anything is
  produced for them (``core.ledger.source_changes``, ``.changed_sources``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio

from orchestrator.concurrency.broadcast import Broadcast
from orchestrator.config import Config
from orchestrator.core.ledger.events import AddedSource, SourceFacts, SourcesChanged
from orchestrator.daemon.parts import SourceParts
from orchestrator.daemon.settings import LiveSettings, RunFigures, SourceSettings, live_settings, parse_weights
from orchestrator.daemon.source_pipeline import SourcePipelineFactory
from orchestrator.errors import OrchestratorError
from orchestrator.prompts import PromptSource
from orchestrator.rewards import Reward
from orchestrator.state import StateStore

from .engines import EngineControl
from .run import RunControl

__all__ = ["RunningConfig", "SharedSettings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedSettings:
    """Who takes over what concerns all sources: mixer, weights, caps.

    ``directory`` is where dotted paths are looked up first, ``replan`` wakes all producers, ``on_figures`` is told what
    a status says of the config.
    """

    sources: SourceParts
    control: RunControl
    directory: Path
    replan: Broadcast
    on_figures: Callable[[RunFigures], None]

    def take_over(self, settings: LiveSettings) -> None:
        """Go on with these from the next batch on.

        Raises:
            OrchestratorError: a weight or a cap cannot be used.
        """
        mixer, names = self.sources.mixer, list(settings.weights)
        mixer.table.replace(names, parse_weights(settings.weights.values(), directory=self.directory))
        mixer.reconfigure(settings.mixer)
        self.sources.caps.replace(names, list(settings.caps.values()), directory=self.directory)
        self.control.reconfigure(settings.weights)
        self.on_figures(settings.figures)
        self.replan.notify()


@dataclass(slots=True)
class _Staged:
    """What is open already and not yet in use."""

    settings: LiveSettings
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
        in_file: the file's: the same without what was done to its sources at run time.
        store: the state.
        sources: whose pipelines and producers are exchanged.
        factory: builds pipelines.
        engines: the engines' side.
        shared: takes over what concerns all sources.
    """

    def __init__(
        self,
        config: Config,
        *,
        in_file: Config,
        store: StateStore,
        sources: SourceParts,
        factory: SourcePipelineFactory,
        engines: EngineControl,
        shared: SharedSettings,
    ) -> None:
        self.config = config
        self.in_file = in_file
        self._settings = live_settings(config)
        self._store = store
        self._sources = sources
        self._factory = factory
        self._engines = engines
        self._shared = shared

    async def become(
        self,
        config: Config,
        rows: dict[str, int],
        *,
        in_file: Config | None = None,
        added: dict[str, AddedSource] | None = None,
        removed: dict[str, dict[str, Any]] | None = None,
        undone: list[str] | None = None,
    ) -> None:
        """Have this config in force.

        Args:
            config: checked wholly.
            rows: how many prompts each source has.
            in_file: the file's, where that is another one now.
            added: sources that come at run time.
            removed: sources of the file that go at run time, with what the file says of them.
            undone: names for which neither holds any more.

        Raises:
            BadRequest: an engine cannot be used; all is as it was.
            OrchestratorError: prompts or a reward cannot be opened; all is as it was.
            StateError: what is in flight could not be parked; all is as it was but the engines.
        """
        staged = _Staged(live_settings(config))
        try:
            await self._stage(rows, staged)
            with anyio.CancelScope(shield=True):
                await self._engines.reconfigure(config)
                change = SourcesChanged(
                    self._facts(staged), added=added or {}, removed=removed or {}, undone=undone or []
                )
                await self._take_over(staged, change)
        except OrchestratorError:
            await staged.aclose()
            raise
        self.config, self.in_file, self._settings = config, in_file or self.in_file, staged.settings

    async def _stage(self, rows: dict[str, int], staged: _Staged) -> None:
        """Open what the sources need that are new, or have changed."""
        for name, settings in staged.settings.sources.items():
            if self._is_same(name, settings, rows[name]):
                continue
            staged.prompts[name] = await settings.prompts.open(name=name, seed=settings.seed)
            staged.rewards[name] = self._factory.reward(settings)

    def _is_same(self, name: str, settings: SourceSettings, rows: int) -> bool:
        """Whether nothing has changed that a source's pipeline is built from."""
        if name not in self._sources.pipelines or self._store.ledger.source(name).rows != rows:
            return False
        return self._settings.sources.get(name) == settings

    async def _take_over(self, staged: _Staged, change: SourcesChanged) -> None:
        sources, pipelines = self._sources, self._sources.pipelines
        changed = [*staged.prompts, *(name for name in pipelines if name not in staged.settings.sources)]
        await sources.producers.park(changed)
        try:
            self._record(change)
            self._shared.take_over(staged.settings)
            old = [pipeline for name in changed if (pipeline := pipelines.pop(name, None)) is not None]
            for name in changed:
                self._exchange(name, staged)
        finally:
            sources.producers.start()
        for pipeline in old:
            await pipeline.aclose()
        await self._store.written()
        await self._store.snapshot()

    def _facts(self, staged: _Staged) -> list[SourceFacts]:
        facts = []
        for name in staged.settings.sources:
            prompts = staged.prompts.get(name) or self._sources.pipelines[name].prompts
            facts.append(SourceFacts(name, len(prompts), prompts.epochs, staged.settings.renamed_from.get(name)))
        return facts

    def _record(self, change: SourcesChanged) -> None:
        before = [(name, state.rows, state.epochs) for name, state in self._store.ledger.sources.items()]
        is_same = before == [(fact.name, fact.rows, fact.epochs) for fact in change.sources]
        if not is_same or change.added or change.removed or change.undone:
            self._store.record(change)

    def _exchange(self, name: str, staged: _Staged) -> None:
        if name in staged.prompts:
            settings = staged.settings.sources[name]
            pipeline = self._factory.pipeline(name, settings, staged.prompts.pop(name), staged.rewards.pop(name))
            self._sources.pipelines[name] = pipeline
            self._sources.producers.put(name, pipeline.producer)
        else:
            self._sources.producers.remove(name)
