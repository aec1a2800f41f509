"""Staleness in policy versions, and the mask of tokens of older policies."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.core.staleness import is_stale, offpolicy_mask, staleness
from orchestrator.records import NO_VERSION


@pytest.mark.parametrize(("current", "oldest", "age"), [(5, 5, 0), (5, 2, 3), (5, None, 0), (2, 5, 0), (0, 0, 0)])
def test_staleness(current: int, oldest: int | None, age: int) -> None:
    assert staleness(current, oldest) == age


@pytest.mark.parametrize(
    ("current", "oldest", "bound", "stale"),
    [(5, 2, 3, False), (6, 2, 3, True), (5, 5, 0, False), (6, 5, 0, True), (99, 0, None, False), (99, None, 0, False)],
)
def test_the_bound_itself_is_allowed(current: int, oldest: int | None, bound: int | None, stale: bool) -> None:
    assert is_stale(current, oldest, bound) is stale


def test_only_tokens_of_the_kept_version_are_trained_on() -> None:
    versions = [[3, 2], [NO_VERSION, 1], [4, 3], [3, 1]]
    assert offpolicy_mask(versions, 4) == bytes([0, 0, 0, 1, 1, 1, 0])
    assert offpolicy_mask(versions, 3) == bytes([1, 1, 0, 0, 0, 0, 1])
    assert offpolicy_mask(versions, NO_VERSION) == bytes(7)
    assert offpolicy_mask([], 4) == b""


@given(st.lists(st.tuples(st.integers(-1, 5), st.integers(1, 50)).map(list), max_size=8), st.integers(0, 5))
def test_masks_are_as_long_as_the_tokens(versions: list[list[int]], keep: int) -> None:
    mask = offpolicy_mask(versions, keep)
    tokens = [version for version, count in versions for _ in range(count)]
    assert list(mask) == [int(version == keep) for version in tokens]
