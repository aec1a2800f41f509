"""Scoring with its retries: a failure gets one more try, a server that is away is waited for."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from orchestrator.errors import RewardError, RewardTimeout
from orchestrator.production.scoring import Scorer
from orchestrator.records import Sample
from orchestrator.rewards import Reward, RewardUnavailable
from tests.rewards.test_http import PROMPT, finished
from tests.support.http_faults import SILENCE, FaultServer, answer, fault_server
from tests.support.specs import build_reward


@asynccontextmanager
async def scorer(*replies: Any, patience_s: float = 30.0, **options: Any) -> AsyncIterator[tuple[FaultServer, Scorer]]:
    async with fault_server(score=replies) as server:
        reward: Reward = build_reward(kind="http", url=f"{server.url}/score", **options)
        try:
            yield server, Scorer(reward, patience_s=patience_s)
        finally:
            await reward.aclose()


def samples(n: int = 3) -> list[Sample]:
    return [finished(index, "x") for index in range(n)]


async def test_a_failure_gets_one_more_try_and_not_two() -> None:
    wrong = answer({"detail": "bad"}, 400)
    async with scorer(wrong, answer({"r": 0.5}), key="r") as (_, one):
        (sample,) = samples(1)
        await one.score_one(sample, PROMPT)
        assert (sample.reward, sample.metadata) == (0.5, {"reward": {"r": 0.5}})
    async with scorer(wrong, wrong, answer(1)) as (server, two):
        (sample,) = samples(1)
        with pytest.raises(RewardError, match="400"):
            await two.score_one(sample, PROMPT)
        assert (sample.reward, server.count("/score")) == (None, 2)


async def test_a_server_that_is_away_is_waited_for() -> None:
    async with scorer(*[answer(b"loading", 503)] * 3, answer(1)) as (server, waiting):
        (sample,) = samples(1)
        await waiting.score_one(sample, PROMPT)
        assert (sample.reward, server.count("/score")) == (1.0, 4)


async def test_but_not_for_ever() -> None:
    async with scorer(answer(b"loading", 503), patience_s=0.25) as (server, waiting):
        (sample,) = samples(1)
        with pytest.raises(RewardUnavailable, match="503: loading"):
            await waiting.score_one(sample, PROMPT)
        assert sample.reward is None
        assert server.count("/score") >= 1


async def test_silence_is_a_failure_like_others() -> None:
    async with scorer(SILENCE, SILENCE, answer(1), timeout_s=0.2) as (server, silent):
        (sample,) = samples(1)
        with pytest.raises(RewardTimeout):
            await silent.score_one(sample, PROMPT)
        assert (sample.reward, server.count("/score")) == (None, 2)


async def test_a_group_gets_all_its_rewards_or_none() -> None:
    async with scorer(answer([1, 2]), answer([1, 2, 3]), group=True) as (server, whole):
        group = samples()
        for sample in group:
            await whole.score_one(sample, PROMPT)  # not by itself
        assert not server.requests
        await whole.score_group(group, PROMPT)
        assert [sample.reward for sample in group] == [1.0, 2.0, 3.0]
        await whole.score_group(group, PROMPT)  # a group that was parked with its rewards
        assert server.count("/score") == 2
    async with scorer(answer([1, 2]), group=True) as (server, whole):
        group = samples()
        with pytest.raises(RewardError, match="2 rewards for 3 samples"):
            await whole.score_group(group, PROMPT)
        assert [sample.reward for sample in group] == [None, None, None]
        assert server.count("/score") == 2


async def test_a_sample_that_has_its_reward_is_not_scored_again() -> None:
    async with scorer(answer(1)) as (server, one):
        (sample,) = samples(1)
        sample.reward = 0.25
        await one.score_one(sample, PROMPT)
        await one.score_group([sample], PROMPT)
        assert (sample.reward, server.requests) == (0.25, [])
