"""Groups taken to their end in this process: read the prompt, generate, score, finish.

Invariants:

* A group ends in exactly one way: buffered, filtered, or failed; each is recorded in the journal, with its reason.
* A failed generation or reward is never a zero reward: the sample is replaced, or the group is dropped and counted.
* A reward of whole groups is asked once, when all samples are finished; when it fails, the group is dropped.
* A group that is cancelled (the daemon stops) is parked: what its samples gained is stored as partial frames, and it
  stays in flight for the restart.
* Samples that are complete stay complete, whatever happens to their siblings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import anyio
from structlog.typing import FilteringBoundLogger

from orchestrator.core.ledger.groups import InFlight
from orchestrator.core.ledger.journal import Journal
from orchestrator.core.staleness import STALE, is_stale
from orchestrator.engines import SamplingParams
from orchestrator.errors import EngineRejected, GenerationFailed, PromptUnavailable, RewardError, RewardTimeout
from orchestrator.records import Group, Prompt, Sample

from .finisher import Finisher, drop
from .group_progress import GroupProgress, GroupStanding
from .prompt_reader import PromptReader, PromptRefused
from .runner import GroupOutcome, RunnerStatistics
from .scoring import Scorer
from .turns import SampleTask, TurnLoop

__all__ = ["GroupSettings", "LocalRunner"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSettings:
    """What the config says about groups of one source.

    ``replace_failed``: a failed sample is generated anew (at most as many times a group as it has samples); otherwise
    its group is dropped. ``logprobs_kind``: see :class:`~orchestrator.records.Group`.
    """

    sampling: SamplingParams
    sampling_header: dict[str, object]
    replace_failed: bool = True
    max_staleness: int | None = None
    logprobs_kind: str = "temperature"


class LocalRunner:
    """A :class:`~.runner.Runner` for one source; see the module's invariants.

    Args:
        prompts: the source's prompts, ready to be generated from.
        turns: takes a sample from its prompt to its end.
        scorer: the source's reward, with its retries.
        finisher: filters and stores finished groups.
        journal: where partial frames are stored, and failed groups are recorded.
        policy_version: the version in force.
        settings: see :class:`GroupSettings`.
        log: a logger bound to the source.
    """

    def __init__(
        self,
        *,
        prompts: PromptReader,
        turns: TurnLoop,
        scorer: Scorer,
        finisher: Finisher,
        journal: Journal,
        policy_version: Callable[[], int],
        settings: GroupSettings,
        log: FilteringBoundLogger,
    ) -> None:
        self._prompts = prompts
        self._turns = turns
        self._scorer = scorer
        self._finisher = finisher
        self._journal = journal
        self._policy_version = policy_version
        self._settings = settings
        self._log = log
        self._runs: dict[int, tuple[GroupProgress, float]] = {}  # by group index: since when on the loop's clock
        self._failed_samples = 0
        self._replaced_samples = 0
        self._last_failure: str | None = None

    async def run(self, launched: InFlight) -> GroupOutcome:
        """Take a launched group to its end; parks it when cancelled."""
        run = GroupProgress.resume(launched)
        self._runs[launched.group_index] = run, anyio.current_time()
        try:
            with run.scope:
                await self._work(run)
        except anyio.get_cancelled_exc_class():
            self._park(run)
            raise
        finally:
            del self._runs[launched.group_index]
        if run.failure is not None:
            self._drop(run, run.failure)
            return GroupOutcome.STALE if run.failure == STALE else GroupOutcome.FAILED
        return self._finish(run)

    def oldest(self) -> GroupStanding | None:
        """How the group stands that was launched first of those worked on; ``None``: there is none."""
        if not self._runs:
            return None
        run, since = self._runs[min(self._runs)]
        return run.standing(anyio.current_time() - since)

    def statistics(self) -> RunnerStatistics:
        """Counts since the start."""
        return RunnerStatistics(self._failed_samples, self._replaced_samples, self._last_failure)

    async def _work(self, run: GroupProgress) -> None:
        """Generate and score all samples; what cannot be done fails the run."""
        try:
            run.prompt, run.prompt_tokens, run.messages = await self._prompts.read(*run.launched.prompt)
        except (PromptUnavailable, PromptRefused) as error:
            self._note_failure(run, error.message)
            run.fail("rejected" if isinstance(error, PromptRefused) else "prompt_failed")
            return
        async with anyio.create_task_group() as tasks:
            for slot in range(len(run.samples)):
                tasks.start_soon(self._sample, run, slot)
        if run.failure is not None:
            return
        try:
            await self._scorer.score_group(run.samples, run.prompt)
        except RewardError as error:
            self._note_failure(run, error.message)
            run.fail(_reason(error))

    # -- samples -------------------------------------------------------------------------------------------------------

    async def _sample(self, run: GroupProgress, slot: int) -> None:
        """Generate and score one sample, and again if it failed and may be replaced."""
        sample = run.samples[slot]
        while run.failure is None:
            try:
                if not sample.is_finished:
                    await self._generate(run, slot)
                await self._scorer.score_one(sample, run.prompt)
            except GenerationFailed as error:
                self._note_failure(run, str(error))
                if isinstance(error.__cause__, EngineRejected):
                    run.fail("rejected")
                else:
                    self._replace(run, slot, "failed")
            except RewardError as error:
                self._note_failure(run, str(error))
                self._replace(run, slot, _reason(error))
            else:
                return

    async def _generate(self, run: GroupProgress, slot: int) -> None:
        sample = run.samples[slot]

        async def store(_: Sample) -> None:
            self._journal.store_partial(run.gained(slot))

        await self._turns.finish(
            SampleTask(
                sample=sample,
                prompt=run.prompt,
                prompt_tokens=run.prompt_tokens,
                messages=run.messages,
                sampling=self._sampling_of(run.prompt),
                trial=sample.metadata.get("replaces_failed", 0),
                before_request=lambda sample: self._give_up_if_stale(run, sample),
                store=store,
            )
        )

    def _sampling_of(self, prompt: Prompt) -> SamplingParams:
        sampling, most = self._settings.sampling, self._max_new_tokens(prompt)
        return sampling if most == sampling.max_new_tokens else replace(sampling, max_new_tokens=most)

    def _max_new_tokens(self, prompt: Prompt) -> int:
        """A prompt may ask for less than its source, never for more: memory and contexts were checked against that."""
        most = self._settings.sampling.max_new_tokens
        return most if prompt.max_new_tokens is None else min(most, prompt.max_new_tokens)

    def _give_up_if_stale(self, run: GroupProgress, sample: Sample) -> None:
        """A partial rollout that is already too old is not continued: its group is dropped and its prompt runs again.

        Beginning only this sample anew would favour short responses, and say nothing of what was thrown away.
        """
        if is_stale(self._policy_version(), sample.oldest_version, self._settings.max_staleness):
            run.fail(STALE)

    def _replace(self, run: GroupProgress, slot: int, reason: str) -> None:
        """Begin a failed sample anew, if the config wants it and it was not done too often in this group."""
        if not self._settings.replace_failed or run.replacements >= len(run.samples):
            run.fail(reason)
            return
        run.replacements += 1
        self._replaced_samples += 1
        run.samples[slot].clear()
        run.samples[slot].metadata = {"replaces_failed": run.replacements}

    def _note_failure(self, run: GroupProgress, message: str) -> None:
        self._failed_samples += 1
        self._last_failure = message
        self._log.warning(f"a sample of group {run.launched.group_index} failed: {message}")

    # -- the end of a group --------------------------------------------------------------------------------------------

    def _finish(self, run: GroupProgress) -> GroupOutcome:
        finished = self._finisher.finish(
            Group(
                source=run.launched.source,
                group_index=run.launched.group_index,
                prompt=run.prompt,
                prompt_tokens=run.prompt_tokens,
                samples=run.samples,
                sampling=self._settings.sampling_header | {"max_new_tokens": self._max_new_tokens(run.prompt)},
                logprobs_kind=self._settings.logprobs_kind,
            )
        )
        if finished.failure is not None:
            self._note_failure(run, finished.failure)
        return finished.outcome

    def _drop(self, run: GroupProgress, reason: str) -> None:
        self._journal.record(drop(run.launched.source, run.launched.group_index, run.samples, reason))

    def _park(self, run: GroupProgress) -> None:
        """Store everything that a restart could not have otherwise."""
        if run.failure is not None:
            self._drop(run, run.failure)
            return
        for slot in run.unsaved():
            self._journal.store_partial(run.gained(slot))


def _reason(error: RewardError) -> str:
    """Under which a group without rewards is counted."""
    return "reward_timeout" if isinstance(error, RewardTimeout) else "reward_failed"
