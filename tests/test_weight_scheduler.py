"""The six schedules: their figures at chosen steps, and what holds at every step."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator import weight_scheduler as schedules

Schedule = Callable[[int], float]

ALL: list[Schedule] = [getattr(schedules, name) for name in schedules.__all__]


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (schedules.easy_to_hard, {0: 0.9, 50: 0.7, 100: 0.5, 200: 0.1, 201: 0.1, 10**9: 0.1}),
        (schedules.hard_to_easy, {0: 0.1, 50: 0.3, 100: 0.5, 200: 0.9, 201: 0.9, 10**9: 0.9}),
        (schedules.exponential_decay, {0: 1.0, 100: 0.9 * math.exp(-1.5) + 0.1, 10**9: 0.1}),
        (schedules.exponential_warmup, {0: 0.0, 100: 0.9 - 0.9 * math.exp(-1.5), 10**9: 0.9}),
        (schedules.level_increasing, {0: 0.5, 49: 0.5, 50: 0.6, 99: 0.6, 100: 0.7, 149: 0.7, 150: 0.8, 10**9: 0.8}),
        (schedules.level_decreasing, {0: 0.8, 49: 0.8, 50: 0.7, 99: 0.7, 100: 0.6, 149: 0.6, 150: 0.5, 10**9: 0.5}),
    ],
)
def test_figures(schedule: Schedule, values: dict[int, float]) -> None:
    assert {step: schedule(step) for step in values} == pytest.approx(values, abs=1e-12)


@given(st.integers(0, 10**12))
def test_every_weight_is_usable_at_every_step(step: int) -> None:
    for schedule in ALL:
        assert 0.0 <= schedule(step) <= 1.0


@given(st.integers(0, 10**6))
def test_pairs_add_up_to_one(step: int) -> None:
    assert schedules.easy_to_hard(step) + schedules.hard_to_easy(step) == pytest.approx(1.0)
    assert schedules.exponential_decay(step) + schedules.exponential_warmup(step) == pytest.approx(1.0)


@given(st.integers(0, 400))
def test_names_say_which_way_the_weight_goes(step: int) -> None:
    for falling in (schedules.easy_to_hard, schedules.exponential_decay, schedules.level_decreasing):
        assert falling(step) >= falling(step + 1)
    for rising in (schedules.hard_to_easy, schedules.exponential_warmup, schedules.level_increasing):
        assert rising(step) <= rising(step + 1)
