"""A producer under failures: what it launches while its reward raises, and how it comes back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import anyio

from orchestrator.core.ledger.leases import LeasedBatch
from orchestrator.engines.scripted import ScriptedEngine
from orchestrator.errors import RewardError
from orchestrator.records import Prompt, Sample
from orchestrator.rewards import RewardResult
from tests.campaigns.plan_comparison import CROSSINGS, AnyReward, Run, by_plan
from tests.support.engine_pools import running_pool
from tests.support.engine_time import JUMPING


class Failing(AnyReward):
    """Raises until it is mended."""

    mended = False

    async def score(self, samples: Sequence[Sample], prompt: Prompt) -> list[RewardResult]:
        if not self.mended:
            raise RewardError("no")
        return await super().score(samples, prompt)


SCENARIO = replace(CROSSINGS, tokens_per_s=1000.0, dropped={"easy": 0.0, "hard": 0.0}, max_staleness=100)


async def produce_for(run: Run, *spans_s: float) -> list[int]:
    """Launches by the end of each span of time; at the end of the first one the reward is mended."""
    engine = ScriptedEngine(name="e", max_in_flight=200, seed=1, length=(2, 80), tokens_per_s=1000.0)
    launched = []
    async with running_pool(engine, policy_version=lambda: 0) as pool, anyio.create_task_group() as tasks:
        for source in run.ledger.sources:
            tasks.start_soon(run.producer(source, pool).run)
        for span in spans_s:
            await anyio.sleep(span)
            launched.append(run.ledger.next_group)
            run.reward.mended = True
        tasks.cancel_scope.cancel()
    return launched


def test_a_reward_that_always_raises_does_not_use_up_the_prompts() -> None:
    """The pause had no effect: the group that was dropped woke the producer, which filled its place at once."""
    run = Run(by_plan, SCENARIO, 60, 1)
    run.reward = Failing()
    options = dict[str, Any](JUMPING)
    while_failing, at_the_end = anyio.run(produce_for, run, 20.0, 40.0, backend="asyncio", backend_options=options)
    places = SCENARIO.buffered
    assert 3 * places < while_failing < 15 * places, "each time twice as long: some ten times in 20 s, not hundreds"
    assert at_the_end <= while_failing + places
    assert isinstance(run.mixer.form(1), LeasedBatch), "it goes on by itself"
