"""The cap schedules: their figures at chosen steps, what holds at every step, and that configs find them."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator import reward_cap_scheduler as schedules
from orchestrator.core.filters import RewardCaps
from tests.support.builders import make_sample

Schedule = Callable[[int], float]

SIX = (
    "increasing_cap",
    "decreasing_cap",
    "exponential_increase",
    "exponential_decrease",
    "step_function_cap",
    "warmup_then_constant",
)
ALL: list[Schedule] = [getattr(schedules, name) for name in schedules.__all__]


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (schedules.increasing_cap, {0: 0.1, 50: 0.3, 100: 0.5, 200: 0.9, 201: 0.9, 10**9: 0.9}),
        (schedules.decreasing_cap, {0: 0.9, 50: 0.7, 100: 0.5, 200: 0.1, 201: 0.1, 10**9: 0.1}),
        (schedules.exponential_increase, {0: 0.0, 100: 0.9 - 0.9 * math.exp(-0.3), 10**9: 0.9}),
        (schedules.exponential_decrease, {0: 1.0, 100: 0.9 * math.exp(-0.3) + 0.1, 10**9: 0.1}),
        (schedules.step_function_cap, {0: 0.2, 99: 0.2, 100: 0.5, 199: 0.5, 200: 0.8, 10**9: 0.8}),
        (schedules.warmup_then_constant, {0: 0.1, 50: 0.35, 100: 0.6, 10**9: 0.6}),
    ],
)
def test_figures(schedule: Schedule, values: dict[int, float]) -> None:
    assert {step: schedule(step) for step in values} == pytest.approx(values, abs=1e-12)


@given(st.integers(0, 10**12))
def test_every_cap_is_usable_at_every_step(step: int) -> None:
    for schedule in ALL:
        assert 0.0 <= schedule(step) <= 1.0


@given(st.integers(0, 400))
def test_names_say_which_way_the_cap_goes(step: int) -> None:
    for falling in (schedules.decreasing_cap, schedules.exponential_decrease, schedules.level_decreasing):
        assert falling(step) >= falling(step + 1)
    for rising in (schedules.increasing_cap, schedules.exponential_increase, schedules.level_increasing):
        assert rising(step) <= rising(step + 1)


@pytest.mark.parametrize("name", SIX)
@pytest.mark.parametrize("module", ["orchestrator", "examples.curriculum_learning"])
def test_a_config_finds_it_in_both_places(module: str, name: str) -> None:
    path = f"{module}.reward_cap_scheduler"
    assert getattr(importlib.import_module(path), name) is getattr(schedules, name)
    caps = RewardCaps(["math", "code"], [f"{path}.{name}", None])
    assert caps.cap("math", 100) == getattr(schedules, name)(100)
    assert caps.cap("code", 100) is None


def test_a_cap_that_rises_lets_easier_groups_in() -> None:
    caps = RewardCaps(["math"], ["orchestrator.reward_cap_scheduler.step_function_cap"])
    group = [make_sample(i, reward=reward) for i, reward in enumerate([1.0, 0.0, 0.0, 0.2])]  # mean 0.3
    assert [caps.check(step, "math", group).keep for step in (0, 99, 100, 500)] == [False, False, True, True]
