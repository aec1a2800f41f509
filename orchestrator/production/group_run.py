"""One group from its launch to the buffer: generate, score, filter, store.

Invariants:

* A group ends in exactly one way: buffered, filtered, or failed; each is recorded in the journal, with its reason.
* A failed generation or reward is never a zero reward: the sample is replaced, or the group is dropped and counted.
* A reward of whole groups is asked once, when all samples are finished; when it fails, the group is dropped.
* A group that is cancelled (the daemon stops) is parked: what its samples gained is stored as partial frames, and it
  stays in flight for the restart.
* Samples that are complete stay complete, whatever happens to their siblings.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum

import anyio
from structlog.typing import FilteringBoundLogger

from orchestrator.core.filters import FilterError, Verdict
from orchestrator.core.ledger.groups import InFlight
from orchestrator.core.ledger.journal import Journal
from orchestrator.core.staleness import STALE, is_stale, offpolicy_mask
from orchestrator.engines import EnginePool, SamplingParams
from orchestrator.errors import EngineRejected, FrameError, GenerationFailed, RewardError, RewardTimeout, TokenizerError
from orchestrator.frames import encode_group
from orchestrator.prompts import PromptSource, PromptUnavailable
from orchestrator.records import Group, Message, Prompt, Sample
from orchestrator.tokenizer import PromptTokenizer

from .group_progress import GroupProgress, GroupStanding
from .scoring import Scorer

__all__ = ["GroupOutcome", "GroupRunner", "GroupSettings"]


class GroupOutcome(Enum):
    """How a group ended."""

    BUFFERED = "buffered"
    FILTERED = "filtered"
    FAILED = "failed"
    STALE = "stale"


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSettings:
    """What the config says about groups of one source.

    ``replace_failed``: a failed sample is generated anew (at most as many times a group as it has samples); otherwise
    its group is dropped. ``logprobs_kind``: see :class:`~orchestrator.records.Group`.
    """

    sampling: SamplingParams
    sampling_header: dict[str, object]
    replace_failed: bool = True
    mask_offpolicy: bool = False
    max_staleness: int | None = None
    logprobs_kind: str = "temperature"


class GroupRunner:
    """Runs the groups of one source; see the module's invariants.

    Args:
        prompts: the source's prompts.
        pool: the engines.
        scorer: the source's reward, with its retries.
        verdict: the filter; keeps or drops a finished group.
        journal: where the end of each group is recorded.
        policy_version: the version in force.
        settings: see :class:`GroupSettings`.
        log: a logger bound to the source.
        tokenizer: for prompts; ``None``: the engines' own.
    """

    def __init__(
        self,
        *,
        prompts: PromptSource,
        pool: EnginePool,
        scorer: Scorer,
        verdict: Callable[[Sequence[Sample]], Verdict],
        journal: Journal,
        policy_version: Callable[[], int],
        settings: GroupSettings,
        log: FilteringBoundLogger,
        tokenizer: PromptTokenizer | None = None,
    ) -> None:
        self._prompts = prompts
        self._pool = pool
        self._scorer = scorer
        self._verdict = verdict
        self._journal = journal
        self._policy_version = policy_version
        self._settings = settings
        self._log = log
        self._text: EnginePool | PromptTokenizer = tokenizer or pool
        self._runs: dict[int, tuple[GroupProgress, float]] = {}  # by group index: since when on the loop's clock
        self.failed_samples = 0
        self.replaced_samples = 0
        self.last_failure: str | None = None

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

    async def _work(self, run: GroupProgress) -> None:
        """Generate and score all samples; what cannot be done fails the run."""
        try:
            run.prompt = await self._prompts.read(run.launched.prompt.prompt_index, run.launched.prompt.epoch)
        except PromptUnavailable as error:
            self._note_failure(run, error.message)
            run.fail("prompt_failed")
            return
        run.prompt_tokens = await self._tokenize(run)
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

    async def _tokenize(self, run: GroupProgress) -> array[int]:
        prompt = run.prompt
        try:
            if await self._pool.is_text_only():
                run.messages = _messages_of(prompt)
                if run.messages is None:
                    self._note_failure(run, "its prompt is token ids, which engines that give text alone cannot take")
                    run.fail("rejected")
                return array("i")
            if prompt.tokens is not None:
                return array("i", prompt.tokens)
            if isinstance(prompt.content, list):
                kwargs = self._settings.sampling.chat_template_kwargs
                return array("i", await self._text.tokenize_chat(prompt.content, kwargs))
            return array("i", await self._text.tokenize(prompt.content or ""))
        except (EngineRejected, TokenizerError) as error:
            self._note_failure(run, f"its prompt was refused: {error}")
            run.fail("rejected")
            return array("i")

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

        async def after_piece(_: Sample) -> None:
            self._journal.store_partial(run.gained(slot))

        await self._pool.generate(
            sample,
            run.prompt_tokens,
            self._sampling_of(run.prompt),
            messages=run.messages,
            before_piece=lambda sample: self._give_up_if_stale(run, sample),
            after_piece=after_piece,
            trial=sample.metadata.get("replaces_failed", 0),
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
        self.replaced_samples += 1
        run.samples[slot].clear()
        run.samples[slot].metadata = {"replaces_failed": run.replacements}

    def _note_failure(self, run: GroupProgress, message: str) -> None:
        self.failed_samples += 1
        self.last_failure = message
        self._log.warning(f"a sample of group {run.launched.group_index} failed: {message}")

    # -- the end of a group --------------------------------------------------------------------------------------------

    def _finish(self, run: GroupProgress) -> GroupOutcome:
        try:
            verdict = self._verdict(run.samples)
        except FilterError as error:
            self._note_failure(run, str(error))
            self._drop(run, "filter_failed")
            return GroupOutcome.FAILED
        if not verdict.keep:
            self._drop(run, verdict.reason or "filtered")
            return GroupOutcome.FILTERED
        if self._settings.mask_offpolicy:
            for sample in run.samples:
                if sample.versions:
                    sample.loss_mask = offpolicy_mask(sample.versions, sample.versions[-1][0])
        group = Group(
            source=run.launched.source,
            group_index=run.launched.group_index,
            prompt=run.prompt,
            prompt_tokens=run.prompt_tokens,
            samples=run.samples,
            sampling=self._settings.sampling_header | {"max_new_tokens": self._max_new_tokens(run.prompt)},
            logprobs_kind=self._settings.logprobs_kind,
        )
        try:
            frame = encode_group(group)
        except FrameError as error:
            self._note_failure(run, f"its group cannot be stored: {error}; let rewards and prompts carry less metadata")
            self._drop(run, "too_large")
            return GroupOutcome.FAILED
        self._journal.store_group(frame, group)
        return GroupOutcome.BUFFERED

    def _drop(self, run: GroupProgress, reason: str) -> None:
        self._journal.record(run.dropped(reason))

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


def _messages_of(prompt: Prompt) -> list[Message] | None:
    """The prompt as a chat; a text is one message of the user. ``None``: it is token ids alone."""
    content = prompt.content
    return [{"role": "user", "content": content}] if isinstance(content, str) else content
