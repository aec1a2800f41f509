"""What the page draws, kept within bounds: every step once, the first and the last ones always."""

from __future__ import annotations

import math
from typing import Any

import orjson
import pytest

from orchestrator.status.history import FIELDS, StepHistory, step_point


def point(step: int, **more: Any) -> dict[str, Any]:
    return {**step_point(step, 0, float(step), {"rollout/trainer_wait_s": 0.5, "rollout/a/weight": 1.0}), **more}


def steps(history: StepHistory) -> list[int]:
    return [orjson.loads(encoded)["step"] for encoded in history.since(0)]


def test_a_point_has_the_figures_of_each_source_in_order() -> None:
    metrics = {
        "rollout/trainer_wait_s": 2.5,
        "rollout/a/weight": 0.25,
        "rollout/a/raw_reward/mean": 0.5,
        "rollout/a/raw_reward/median": 9.0,  # not drawn
        "rollout/a/dropped/stale": 2,
        "rollout/a/dropped/zero_std": 3,
        "rollout/b/weight": math.nan,
        "rollout/b/group_count": 4,
        "other/c/weight": 1.0,
    }
    made = step_point(7, 3, 12.5, metrics)
    assert (made["step"], made["policy_version"], made["time"], made["wait_s"]) == (7, 3, 12.5, 2.5)
    a, b = (dict(zip(FIELDS, made["sources"][name], strict=True)) for name in "ab")
    assert (a["weight"], a["raw_reward/mean"], a["dropped"], a["group_count"]) == (0.25, 0.5, 5, None)
    assert (b["weight"], b["group_count"], b["dropped"]) == (None, 4, 0)
    assert made["sources"].keys() == {"a", "b"}


@pytest.mark.parametrize("bounds", [{"max_points": 64}, {"max_bytes": 10_000}])
def test_a_long_run_is_thinned_from_its_older_half(bounds: dict[str, int]) -> None:
    history = StepHistory(**bounds)
    for step in range(3000):
        history.add(point(step))
        assert len(history) <= 64 or "max_bytes" in bounds
        assert sum(map(len, history.since(0))) <= bounds.get("max_bytes", 10**9)
        newest = [made["step"] for made in history.last(16)]
        assert newest == list(range(max(0, step - 15), step + 1)), "in full"
    kept = steps(history)
    assert kept[0] == 0
    assert kept == sorted(set(kept))
    assert history.newest == 3000


def test_steps_that_a_checkpoint_takes_back_are_replaced() -> None:
    history = StepHistory()
    history.refill([point(step) for step in range(9)], below=5)
    assert steps(history) == [0, 1, 2, 3, 4]
    for step in (5, 6, 3):
        history.add(point(step))
    assert steps(history) == [0, 1, 2, 3]
    assert [orjson.loads(encoded)["step"] for encoded in history.since(history.newest - 1)] == [3]
    assert [made["step"] for made in history.last(2)] == [2, 3]
    assert history.last(0) == []
