"""What a generation in flight costs: its timer, its numbers."""

from __future__ import annotations

import random
from typing import Any

import pytest

from orchestrator.engines.pool.member import Member
from orchestrator.engines.pool.requests_in_flight import STALL_SLACK, RequestInFlight
from orchestrator.engines.sglang.engine import SGLangEngine
from orchestrator.records import Sample


@pytest.mark.parametrize("seed", range(20))
async def test_the_timer_of_a_stall_is_never_early_and_hardly_late(seed: int) -> None:
    draw, now = random.Random(seed), 0.0
    stall_s, timeout_s = draw.uniform(0.01, 60), draw.uniform(1, 200)
    flight = RequestInFlight(_member(), now, timeout_s, stall_s, clock=lambda: now)
    for _ in range(40):
        now += draw.choice([0.001, 1, 30]) * draw.random()
        flight.touch()
        assert min(timeout_s, now + stall_s) <= flight.scope.deadline
        assert flight.scope.deadline <= min(timeout_s, now + (1 + STALL_SLACK) * stall_s) + 1e-6


async def test_the_timer_of_a_stall_is_seldom_set() -> None:
    now, deadlines = 0.0, set()
    flight = RequestInFlight(_member(), now, 600.0, 60.0, clock=lambda: now)
    for event in range(1000):
        now = event / 100
        flight.touch()
        deadlines.add(flight.scope.deadline)
    assert len(deadlines) <= 4


def _member() -> Member:
    return Member(SGLangEngine(name="e", url="http://127.0.0.1:1"))


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_sample_takes_numbers_in_any_sequence(kind: Any) -> None:
    sample = Sample(index=0)
    sample.extend([1, 2], kind([-0.5, -1.0]), 3)
    assert sample.logprobs is not None
    assert (sample.tokens.tolist(), sample.logprobs.tolist(), sample.versions) == ([1, 2], [-0.5, -1.0], [[3, 2]])
