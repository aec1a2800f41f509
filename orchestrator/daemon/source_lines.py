"""What each source has of its own: prompts, reward, producer; built from the config, exchanged when it changes.

Invariants:

* A line is built before the one that it replaces is closed.
* Nothing of a line knows the config, or another line.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from orchestrator.concurrency.broadcast import Broadcast
from orchestrator.config import Config, sampling_header, sampling_params
from orchestrator.core.filters import RewardCaps, Verdict, load_filter
from orchestrator.core.mixture.mixer import Mixer
from orchestrator.engines import EnginePool
from orchestrator.logs import LogHandle
from orchestrator.production.finisher import Finisher
from orchestrator.production.group_source import GroupSource
from orchestrator.production.launcher import LaunchControl, Launcher
from orchestrator.production.local_runner import GroupSettings, LocalRunner
from orchestrator.production.producer import Producer
from orchestrator.production.prompt_reader import PromptReader
from orchestrator.production.scoring import Scorer
from orchestrator.production.turns import SingleTurn
from orchestrator.prompts import PromptSource
from orchestrator.records import Sample
from orchestrator.rewards import Reward
from orchestrator.state import StateStore
from orchestrator.tokenizer import PromptTokenizer

__all__ = ["SourceLine", "SourceLines"]


@dataclass(frozen=True, slots=True)
class SourceLine:
    """One source's part of the daemon."""

    prompts: PromptSource
    reward: Reward
    producer: GroupSource

    async def aclose(self) -> None:
        """Let processes and files go; the producer is stopped."""
        await self.reward.aclose()
        await self.prompts.aclose()


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceLines:
    """Builds them.

    ``store`` is the state, ``mixer`` says what to produce, ``pool`` generates, ``caps`` are the reward caps,
    ``replan`` is notified of what concerns all producers, ``logs`` says where lines go, ``directory`` is where dotted
    paths are looked up first.
    """

    store: StateStore
    mixer: Mixer
    pool: EnginePool
    caps: RewardCaps
    replan: Broadcast
    logs: LogHandle
    directory: Path
    tokenizer: PromptTokenizer | None

    def reward(self, config: Config, source: str) -> Reward:
        """The source's reward.

        Raises:
            DottedPathError, ValueError: it cannot be used.
        """
        return config.source(source).reward.build(directory=self.directory)

    def line(self, config: Config, source: str, prompts: PromptSource, reward: Reward) -> SourceLine:
        """A source's line; the ledger has the source.

        Raises:
            OrchestratorError: the filter cannot be used.
        """
        rollout, sampling = config.rollout, config.sampling_of(source)
        log = self.logs.logger("producer", source=source)
        params = sampling_params(sampling, seed=config.run.seed)
        runner = LocalRunner(
            prompts=PromptReader(
                prompts, self.pool, template_kwargs=params.chat_template_kwargs, tokenizer=self.tokenizer
            ),
            turns=SingleTurn(self.pool),
            scorer=Scorer(reward),
            finisher=Finisher(
                verdict=self._verdict(config, source),
                journal=self.store,
                mask_offpolicy=rollout.mask_offpolicy_in_partial_rollout,
            ),
            journal=self.store,
            policy_version=lambda: self.store.ledger.policy_version,
            settings=GroupSettings(
                sampling=params,
                sampling_header=sampling_header(sampling),
                replace_failed=rollout.failed_sample == "replace",
                max_staleness=rollout.max_staleness,
                logprobs_kind=config.logprobs_kind,
            ),
            log=log,
        )
        launcher = Launcher(
            state=self.store.ledger.source(source),
            ledger=self.store.ledger,
            journal=self.store,
            row_at=prompts.row_at,
            n_samples=rollout.n_samples_per_prompt,
        )
        control = LaunchControl(
            demand=lambda: self.mixer.demand(source),
            may_launch=lambda: not self.store.is_congested,
            replan=self.replan,
        )
        producer = Producer(launcher=launcher, runner=runner, control=control, log=log)
        return SourceLine(prompts, reward, producer)

    def _verdict(self, config: Config, source: str) -> Callable[[Sequence[Sample]], Verdict]:
        """The filter of a source: its reward cap, then the configured filter."""
        chosen = load_filter(config.dynamic_sampling_filter, directory=self.directory)
        args = SimpleNamespace(
            data_source=source,
            n_samples_per_prompt=config.rollout.n_samples_per_prompt,
            rollout_batch_size=config.rollout.rollout_batch_size,
        )

        def verdict(samples: Sequence[Sample]) -> Verdict:
            capped = self.caps.check(self.store.ledger.step, source, samples)
            return chosen(args, list(samples)) if capped.keep else capped

        return verdict
