"""Apportionment against an exact oracle, and the bound on what any source is owed (G1)."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from orchestrator.core.mixture.apportionment import UNIT, Apportionment, apportion

EXACT = 2**-30
"""Groups: more than the rounding of shares to units adds up to in the short histories of these tests."""


def harmonic(n: int) -> float:
    return sum(1 / i for i in range(1, n + 1))


def bound(n: int) -> float:
    """The most that G1 lets a source be ahead or behind."""
    return 1.0 if n <= 3 else max(1.5, harmonic(n) - 1)


def one_at_a_time(owed: list[Fraction], size: int) -> list[int]:
    """The rule as it is stated: ``size`` times one group from the fullest, lower index first."""
    owed, counts = list(owed), [0] * len(owed)
    for _ in range(size):
        fullest = max(range(len(owed)), key=lambda i: (owed[i], -i))
        owed[fullest] -= 1
        counts[fullest] += 1
    return counts


def exact_parts(shares: list[float], size: int) -> list[Fraction]:
    """``size x share`` of each source, without any rounding."""
    total = sum(map(Fraction, shares))
    return [size * Fraction(share) / total for share in shares]


sources = st.integers(1, 32)
sizes = st.integers(1, 512)


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[list[float]], int]:
    """The shares of some batches (not normalised) and the batch size."""
    n, size = draw(sources), draw(sizes)
    weight = st.one_of(st.floats(0.0, 1.0), st.sampled_from([0.0, 0.1, 0.3, 1.0, 1e-9]))
    row = st.lists(weight, min_size=n, max_size=n).filter(any)
    return draw(st.lists(row, min_size=1, max_size=12)), size


@given(histories())
@example(([[0.3, 0.3, 0.3, 0.1]] * 12, 5))
@example(([[0.95, 0.05]] * 12, 8))
@example(([[1.0, 0.0], [0.0, 1.0]] * 6, 1))
def test_counts_are_those_of_the_rule_and_stay_within_the_bound(history: tuple[list[list[float]], int]) -> None:
    rows, size = history
    n = len(rows[0])
    carry: tuple[float, ...] = (0.0,) * n
    due = [Fraction(0)] * n
    handed_out = [0] * n
    for shares in rows:
        result = apportion(shares, carry, size)
        due = [total + part for total, part in zip(due, exact_parts(shares, size), strict=True)]
        # What the cups held before groups were taken, in whole units and so without rounding.
        cups = [Fraction(after) + count for after, count in zip(result.carry, result.counts, strict=True)]
        assert list(result.counts) == one_at_a_time(cups, size)
        assert sum(result.counts) == size
        assert min(result.counts) >= 0
        assert sum(map(Fraction, result.carry)) == 0
        handed_out = [total + count for total, count in zip(handed_out, result.counts, strict=True)]
        for owed, part, given_out in zip(result.carry, due, handed_out, strict=True):
            assert abs(owed - float(part - given_out)) < EXACT
            assert abs(float(part - given_out)) < bound(n) + EXACT
        carry = result.carry
        assert min(carry) > -1.0
        assert max(carry) <= harmonic(n) - 1 + EXACT


class Adversary:
    """Chooses shares (and pauses) that drive the carry up: it levels the fullest k cups, for varying k."""

    def __init__(self, seed: int, n: int, *, pauses: bool) -> None:
        self._random = random.Random(seed)
        self._n = n
        self._pauses = pauses

    def shares(self, carry: tuple[float, ...], size: int) -> list[float]:
        order = sorted(range(self._n), key=lambda i: -carry[i])
        if self._random.random() < 0.3:
            return [self._random.random() ** 3 + 1e-9 for _ in order]
        fullest = order[: self._random.randint(1, self._n)]
        level = (size + sum(carry[i] for i in fullest)) / len(fullest)
        return [max(1e-9, level - carry[i]) if i in fullest else 1e-9 for i in range(self._n)]

    def active(self, carry: tuple[float, ...]) -> list[bool]:
        if not self._pauses or self._random.random() < 0.3:
            return [True] * self._n
        order = sorted(range(self._n), key=lambda i: carry[i], reverse=self._random.random() < 0.5)
        paused = order[: self._random.randrange(self._n)]
        return [i not in paused for i in range(self._n)]


def worst(n: int, *, pauses: bool, seed: int, batches: int = 1500) -> float:
    adversary = Adversary(seed, n, pauses=pauses)
    carry: tuple[float, ...] = (0.0,) * n
    most = 0.0
    for batch in range(batches):
        size = (1, 1, 2, 7)[batch % 4]
        active = adversary.active(carry)
        result = apportion(adversary.shares(carry, size), carry, size, active=active)
        assert sum(result.counts) == size
        assert all(is_active or not count for is_active, count in zip(active, result.counts, strict=True))
        assert sum(map(Fraction, result.carry)) == 0
        carry = result.carry
        most = max(most, *map(abs, carry))
    return most


@pytest.mark.parametrize("n", [2, 3, 4, 5, 8])
def test_an_adversary_reaches_the_bound_and_not_more(n: int) -> None:
    most = max(worst(n, pauses=False, seed=seed) for seed in range(3))
    limit = max(harmonic(n) - 1, 1 - 1 / n)
    assert most <= limit + 1e-6
    assert most > 0.8 * limit


@pytest.mark.parametrize("n", [2, 3, 4, 5, 8])
def test_pauses_chosen_by_an_adversary_stay_within_the_guarantee(n: int) -> None:
    assert max(worst(n, pauses=True, seed=seed) for seed in range(3)) < bound(n)


def test_smooth_schedules_stay_below_one_group() -> None:
    """Constant shares, and ones that move by at most 1/200 a step."""
    rng = random.Random(7)
    for n in (2, 5, 16, 32):
        rows = [[rng.random() + 0.01 for _ in range(n)] for _ in range(2)]
        carry: tuple[float, ...] = (0.0,) * n
        for step in range(600):
            way = min(step / 200, 1.0)
            shares = [a + (b - a) * way for a, b in zip(*rows, strict=True)]
            carry = apportion(shares, carry, 32).carry
            assert max(map(abs, carry)) < 1.0


def test_where_rounding_each_share_by_itself_fails() -> None:
    result = apportion([0.3, 0.3, 0.3, 0.1], [0.0] * 4, 5)
    assert sorted(result.counts) == [0, 1, 2, 2] or sorted(result.counts) == [1, 1, 1, 2]
    totals, carry = [0, 0], (0.0, 0.0)
    for _ in range(100):
        result = apportion([0.95, 0.05], carry, 8)
        totals = [total + count for total, count in zip(totals, result.counts, strict=True)]
        carry = result.carry
    assert totals == [760, 40]


def test_single_groups_are_mixed_too() -> None:
    """Batches of one group: every source gets its turn."""
    carry: tuple[float, ...] = (0.0, 0.0)
    turns = []
    for _ in range(8):
        result = apportion([0.75, 0.25], carry, 1)
        turns.append(result.counts.index(1))
        carry = result.carry
    assert turns == [0, 0, 1, 0, 0, 0, 1, 0]


def test_ties_go_to_the_lower_index() -> None:
    assert apportion([1.0] * 4, [0.0] * 4, 2).counts == (1, 1, 0, 0)
    assert apportion([1.0] * 4, [0.0] * 4, 6).counts == (2, 2, 1, 1)
    assert apportion([1.0, 1.0], [0.5, -0.5], 1).counts == (1, 0)


def test_the_carry_does_not_drift() -> None:
    """Shares without a finite binary form, over many batches: the sum is 0 to the last bit."""
    carry: tuple[float, ...] = (0.0,) * 3
    given_out = 0
    for _ in range(20_000):
        result = apportion([0.1, 0.2, 0.7], carry, 3)
        carry = result.carry
        given_out += result.counts[0]
    assert sum(map(Fraction, carry)) == 0
    assert abs(6_000 - given_out - carry[0]) < 20_000 * 3 * UNIT


@given(st.lists(st.floats(-1e12, 1e12), min_size=1, max_size=8), st.integers(1, 64))
def test_any_carry_gives_whole_batches(carry: list[float], size: int) -> None:
    """A state file may say anything: the batch is complete all the same."""
    result = apportion([1.0] * len(carry), carry, size)
    assert sum(result.counts) == size
    assert min(result.counts) >= 0


@given(st.lists(st.integers(-12, 12), min_size=1, max_size=8), st.integers(1, 16))
@example([-2, -6], 2)
def test_the_rule_holds_where_carries_do_not_add_up_to_zero(quarters: list[int], size: int) -> None:
    """As after pauses: some are the fullest more than once, and many are equally full."""
    result = apportion([1.0] * len(quarters), [quarter / 4 for quarter in quarters], size)
    cups = [Fraction(after) + count for after, count in zip(result.carry, result.counts, strict=True)]
    assert list(result.counts) == one_at_a_time(cups, size)


# -- pauses and limits ------------------------------------------------------------------------------------------------


def test_a_paused_source_keeps_its_carry() -> None:
    first = apportion([0.4, 0.35, 0.25], [0.0] * 3, 2)
    second = apportion([0.4, 0.35, 0.25], first.carry, 4, active=[False, True, True])
    assert second.counts[0] == 0
    assert second.carry[0] == first.carry[0] != 0.0
    assert sum(second.counts) == 4


def test_nothing_is_given_without_a_share() -> None:
    nothing = Apportionment((0, 0), (0.5, -0.5))
    assert apportion([0.0, 0.0], [0.5, -0.5], 4) == nothing
    assert apportion([1.0, 0.0], [0.5, -0.5], 4, active=[False, True]) == nothing


def test_a_share_of_zero_gets_what_it_is_owed_and_no_more() -> None:
    assert apportion([1.0, 0.0], [-0.6, 0.6], 1).counts == (0, 1)
    assert apportion([1.0, 0.0], [0.0, 0.0], 9).counts == (9, 0)
    # Not even where the others owe a paused source more than they get.
    assert apportion([1.0, 0.0, 0.0], [-1.5, 0.0, 1.5], 1, active=[True, True, False]).counts == (1, 0, 0)
    # A source of share 0 that was ahead stays as far ahead, also where it is the fullest.
    assert apportion([1.0, 0.0, 0.0], [-1.5, -0.25, 1.75], 1, active=[True, True, False]).carry[1] == -0.25
    # Nor where the only source with a share is exhausted.
    assert apportion([1.0, 0.0], [-0.6, 0.6], 5, limits=[2, None]).counts == (2, 1)


def test_what_a_limited_source_cannot_give_comes_from_the_others() -> None:
    result = apportion([0.5, 0.3, 0.2], [0.0] * 3, 10, limits=[1, None, None])
    assert result.counts == (1, 5, 4)
    assert result.carry[0] == 0.0
    assert result.carry[1:] == pytest.approx([0.4, -0.4])


def test_limits_can_make_a_batch_incomplete() -> None:
    result = apportion([0.5, 0.5], [0.0, 0.0], 8, limits=[1, 2])
    assert result == Apportionment((1, 2), (0.0, 0.0))


@given(histories(), st.data())
def test_limits_are_kept_and_used_up(history: tuple[list[list[float]], int], data: st.DataObject) -> None:
    rows, size = history
    n = len(rows[0])
    carry: tuple[float, ...] = (0.0,) * n
    for row in rows:
        limits = data.draw(st.lists(st.one_of(st.none(), st.integers(0, size)), min_size=n, max_size=n))
        result = apportion(row, carry, size, limits=limits)
        with_share = [i for i in range(n) if row[i] > 0]
        assert all(0 <= result.counts[i] <= (size if limit is None else limit) for i, limit in enumerate(limits))
        if any(limits[i] is None for i in with_share):
            assert sum(result.counts) == size
            assert sum(map(Fraction, result.carry)) == sum(map(Fraction, carry))
        elif sum(result.counts) < size:
            assert all(result.counts[i] == limits[i] for i in with_share)
        carry = result.carry


@given(histories())
def test_limits_that_do_not_bind_change_nothing(history: tuple[list[list[float]], int]) -> None:
    rows, size = history
    carry = [0.0] * len(rows[0])
    assert apportion(rows[0], carry, size, limits=[size] * len(carry)) == apportion(rows[0], carry, size)


@settings(max_examples=50)
@given(st.lists(st.floats(min_value=0.0, allow_infinity=False, allow_nan=False), min_size=1, max_size=8).filter(any))
def test_shares_of_any_magnitude_are_normalised(shares: list[float]) -> None:
    assert sum(apportion(shares, [0.0] * len(shares), 64).counts) == 64


@pytest.mark.parametrize(
    ("shares", "carry", "size", "more"),
    [
        ([1.0], [0.0, 0.0], 1, {}),
        ([1.0], [0.0], 0, {}),
        ([-1.0, 2.0], [0.0, 0.0], 1, {}),
        ([float("nan")], [0.0], 1, {}),
        ([1.0], [float("inf")], 1, {}),
        ([1.0], [0.0], 1, {"limits": [-1]}),
        ([1.0], [0.0], 1, {"active": [True, True]}),
    ],
)
def test_arguments_out_of_range_are_errors(shares: list[float], carry: list[float], size: int, more: dict) -> None:
    with pytest.raises(ValueError):
        apportion(shares, carry, size, **more)
