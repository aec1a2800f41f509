"""What each source has of its own: prompts, reward, producer; built from its settings, exchanged when these change.

Invariants:

* A pipeline is built before the one that it replaces is closed.
* Nothing of a pipeline knows the config, or another pipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from orchestrator.concurrency.broadcast import Broadcast
from orchestrator.core.filters import RewardCaps, Verdict, load_filter
from orchestrator.core.mixture.mixer import Mixer
from orchestrator.engines import EnginePool
from orchestrator.logs import LogHandle
from orchestrator.production.finisher import Finisher
from orchestrator.production.group_source import GroupSource
from orchestrator.production.launcher import LaunchControl, Launcher
from orchestrator.production.local_runner import LocalRunner
from orchestrator.production.producer import Producer
from orchestrator.production.prompt_reader import PromptReader
from orchestrator.production.scoring import Scorer
from orchestrator.production.turns import SingleTurn
from orchestrator.prompts import PromptSource
from orchestrator.records import Sample
from orchestrator.rewards import Reward
from orchestrator.state import StateStore
from orchestrator.tokenizer import PromptTokenizer

from .settings import SourceSettings

__all__ = ["SourcePipeline", "SourcePipelineFactory"]


@dataclass(frozen=True, slots=True)
class SourcePipeline:
    """One source's part of the daemon: from its prompts to its buffer."""

    prompts: PromptSource
    reward: Reward
    producer: GroupSource

    async def aclose(self) -> None:
        """Let processes and files go; the producer is stopped."""
        await self.reward.aclose()
        await self.prompts.aclose()


@dataclass(frozen=True, slots=True, kw_only=True)
class SourcePipelineFactory:
    """Builds them.

    ``store`` is the state, ``mixer`` says what to produce, ``pool`` generates, ``caps`` are the reward caps,
    ``replan`` is notified of what concerns all producers, ``logs`` says where lines go, ``directory`` is where dotted
    paths are looked up first, ``tokenizer`` is the run's own (``None``: the engines tokenise).
    """

    store: StateStore
    mixer: Mixer
    pool: EnginePool
    caps: RewardCaps
    replan: Broadcast
    logs: LogHandle
    directory: Path
    tokenizer: PromptTokenizer | None

    def reward(self, settings: SourceSettings) -> Reward:
        """A source's reward.

        Raises:
            DottedPathError, ValueError: it cannot be used.
        """
        return settings.reward.build(directory=self.directory)

    def pipeline(self, source: str, settings: SourceSettings, prompts: PromptSource, reward: Reward) -> SourcePipeline:
        """A source's pipeline; the ledger has the source.

        Raises:
            OrchestratorError: the filter cannot be used.
        """
        store, log = self.store, self.logs.logger("producer", source=source)
        template_kwargs = settings.groups.sampling.chat_template_kwargs
        runner = LocalRunner(
            prompts=PromptReader(prompts, self.pool, template_kwargs=template_kwargs, tokenizer=self.tokenizer),
            turns=SingleTurn(self.pool),
            scorer=Scorer(reward),
            finisher=Finisher(
                verdict=self._verdict(source, settings), journal=store, mask_offpolicy=settings.mask_offpolicy
            ),
            journal=store,
            policy_version=lambda: store.ledger.policy_version,
            settings=settings.groups,
            log=log,
        )
        launcher = Launcher(
            state=store.ledger.source(source),
            ledger=store.ledger,
            journal=store,
            row_at=prompts.row_at,
            n_samples=settings.n_samples,
        )
        control = LaunchControl(
            demand=lambda: self.mixer.demand(source),
            may_launch=lambda: not store.is_congested,
            replan=self.replan,
        )
        producer = Producer(launcher=launcher, runner=runner, control=control, log=log)
        return SourcePipeline(prompts, reward, producer)

    def _verdict(self, source: str, settings: SourceSettings) -> Callable[[Sequence[Sample]], Verdict]:
        """The filter of a source: its reward cap, then the configured filter."""
        chosen = load_filter(settings.filter, directory=self.directory)
        args = SimpleNamespace(
            data_source=source,
            n_samples_per_prompt=settings.n_samples,
            rollout_batch_size=settings.batch_size,
        )

        def verdict(samples: Sequence[Sample]) -> Verdict:
            capped = self.caps.check(self.store.ledger.step, source, samples)
            return chosen(args, list(samples)) if capped.keep else capped

        return verdict
