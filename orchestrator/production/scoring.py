"""Scoring: finished samples to rewards, one by one or a group at a time, with the retries that this takes.

Invariants:

* This is the one layer that asks a reward again. A failure gets one more try at once; a reward server that is away or
  busy is waited for, with growing pauses and jitter, up to ``patience_s``: generations are minutes of GPU time, and a
  server that is started again must not cost them.
* Either all samples of a call get their rewards or none does, and the error says why; nothing becomes a zero.
* Nothing is held across an interruption: samples without a reward are scored after the restart.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Final

import anyio

from orchestrator.errors import RewardError
from orchestrator.records import Prompt, Sample
from orchestrator.rewards import Reward, RewardResult, RewardUnavailable

__all__ = ["Scorer"]

ATTEMPTS: Final = 2
"""A reward gets a second try: a worker process may have died of another sample's doing."""

PATIENCE_S: Final = 300.0
"""A server of a reward model takes minutes to start; longer than this it is not coming back by itself."""

FIRST_PAUSE_S: Final = 0.2
MAX_PAUSE_S: Final = 10.0
"""As late as this a server that is there again is noticed."""

MAX_DOUBLINGS: Final = 10


class Scorer:
    """Scores the samples of one source; see the module's invariants.

    Args:
        reward: the source's reward.
        patience_s: how long one call waits for a server that is away, in seconds.
    """

    def __init__(self, reward: Reward, *, patience_s: float = PATIENCE_S) -> None:
        self._reward = reward
        self._patience_s = patience_s
        self._jitter = random.Random()  # noqa: S311 - spreads retries, keeps no secret

    async def score_one(self, sample: Sample, prompt: Prompt) -> None:
        """Give a finished sample its reward, unless it has one or its whole group is scored at once.

        Raises:
            RewardError: it could not be scored.
        """
        if sample.reward is None and not self._reward.is_whole_group:
            await self._score([sample], prompt)

    async def score_group(self, samples: Sequence[Sample], prompt: Prompt) -> None:
        """Give the finished samples of a whole group their rewards, unless they have them.

        Raises:
            RewardError: they could not be scored; none of them has a new reward.
        """
        if any(sample.reward is None for sample in samples):
            await self._score(samples, prompt)

    async def _score(self, samples: Sequence[Sample], prompt: Prompt) -> None:
        for sample, result in zip(samples, await self._ask(samples, prompt), strict=True):
            sample.reward = result.value
            if result.detail is not None:
                sample.metadata["reward"] = result.detail

    async def _ask(self, samples: Sequence[Sample], prompt: Prompt) -> list[RewardResult]:
        failures = unavailable = 0
        give_up_at = anyio.current_time() + self._patience_s
        while True:
            try:
                return await self._reward.score(samples, prompt)
            except RewardUnavailable:
                pause = self._pause(unavailable)
                if anyio.current_time() + pause > give_up_at:
                    raise
                unavailable += 1
                await anyio.sleep(pause)
            except RewardError:
                failures += 1
                if failures == ATTEMPTS:
                    raise

    def _pause(self, failures: int) -> float:
        longest = min(MAX_PAUSE_S, FIRST_PAUSE_S * 2 ** min(failures, MAX_DOUBLINGS))
        return self._jitter.uniform(longest / 2, longest)
