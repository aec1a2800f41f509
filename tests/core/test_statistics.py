"""Summaries against Python's own statistics module."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.core.statistics import HALF_LIFE_GROUPS, Acceptance, Summary, summarize

numbers = st.floats(-1e6, 1e6)


def test_a_summary_of_nothing_is_zeros() -> None:
    assert summarize([]) == Summary(count=0, mean=0.0, median=0.0, max=0.0, min=0.0, std=0.0)


@given(st.lists(numbers, min_size=1, max_size=50))
def test_summaries_are_those_of_the_standard_library(values: list[float]) -> None:
    summary = summarize(iter(values))
    assert (summary.count, summary.min, summary.max) == (len(values), min(values), max(values))
    assert summary.mean == pytest.approx(statistics.fmean(values), abs=1e-9)
    assert summary.median == pytest.approx(statistics.median(values))
    assert summary.std == pytest.approx(statistics.pstdev(values), abs=1e-6)


def test_equal_numbers_have_no_deviation() -> None:
    assert summarize([0.1] * 3) == Summary(3, 0.1, 0.1, 0.1, 0.1, 0.0)


def test_acceptance_starts_at_one_and_halves() -> None:
    acceptance = Acceptance()
    assert acceptance.value == 1.0
    for _ in range(HALF_LIFE_GROUPS):
        acceptance.add(False)
    assert acceptance.value == pytest.approx(0.5)
    for _ in range(HALF_LIFE_GROUPS):
        acceptance.add(True)
    assert acceptance.value == pytest.approx(0.75)


@given(st.lists(st.booleans(), max_size=300))
def test_acceptance_stays_a_share(kept: list[bool]) -> None:
    acceptance = Acceptance()
    for one in kept:
        acceptance.add(one)
        assert 0.0 <= acceptance.value <= 1.0


def test_acceptance_settles_at_the_share() -> None:
    acceptance = Acceptance()
    for i in range(1000):
        acceptance.add(i % 4 == 0)
    assert acceptance.value == pytest.approx(0.25, abs=0.05)
