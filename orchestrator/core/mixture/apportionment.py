"""From shares to whole groups: how many groups of each source a batch has.

Invariants:

* Counts are never negative and add up to exactly the batch size, unless limits leave less to give.
* What a source is owed (its *carry*, in groups) goes from batch to batch: carry + size x share - count. After every
  batch the carry of each of n sources is above -1 and at most H_n - 1 (1/2 for two sources, 5/6 for three; H_n is the
  harmonic number), whatever the shares do from batch to batch.
* Carries are multiples of :data:`UNIT` and add up to 0 exactly, for ever: all sums are of integers. Only the rounding
  of a share to units is inexact, by at most n units a batch, so a million batches of 64 sources stay within 1e-4
  groups of the exact sums.
* The same arguments give the same counts on every machine; ties go to the lower index.

The rule is to pour ``size x share`` into each source's cup and then to take ``size`` groups one at a time from the
fullest. No rule that does not know the coming shares does better: D. Coppersmith, T. Nowicki, G. Paleologo,
C. Tresser, C. W. Wu, "The optimality of the online greedy algorithm in carpool and chairman assignment problems", ACM
Transactions on Algorithms 7(3), 2011. They take one group a round; here is why whole batches keep the bound. Let T be
the k fullest cups after a batch, m_k their mean. If a cup outside of T was taken from, it was the fullest when that
happened last, so it is at least max(T) - 1 now, and m_k <= m_(k+1) + 1/(k+1). If none was, T has lost ``size`` and
gained at most ``size``, so m_k is not above the largest m_k of the batch before. With m_n = 0 that gives
m_1 <= 1/2 + … + 1/n. And the fullest cup always holds more than 0 while groups are left to take, so none falls to -1.

While sources are paused the carries of the others add up to the negative of theirs. With one of three paused at a, the
other two stay between -(1 + a)/2 and (1 - a)/2, so three sources are always within (-1, 1), pauses included; the tests
find no history of pauses that takes more sources beyond max(1.5, H_n - 1).
"""

from __future__ import annotations

import heapq
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

__all__ = ["UNIT", "Apportionment", "apportion"]

_UNITS_PER_GROUP: Final = 1 << 40

UNIT: Final = 1.0 / _UNITS_PER_GROUP
"""2^-40 groups. Carries below 2^12 groups are then exact as floats, and shares lose nothing that a batch would show."""


@dataclass(frozen=True, slots=True)
class Apportionment:
    """``counts`` [n] are the groups of each source in this batch, ``carry`` [n] what each is owed after it."""

    counts: tuple[int, ...]
    carry: tuple[float, ...]


def apportion(
    shares: Sequence[float],
    carry: Sequence[float],
    size: int,
    *,
    active: Sequence[bool] | None = None,
    limits: Sequence[int | None] | None = None,
) -> Apportionment:
    """The counts of one batch.

    A source of share 0 gets a group only for what it is still owed. An inactive (paused) source gets none and keeps its
    carry untouched; the others then share a batch of full size, and their carries add up to the negative of its own.

    A limited source (exhausted: it has at most that many groups) gives what it has, and its claim to more passes to the
    others in proportion to their shares; so it is neither owed anything afterwards nor do the others owe it.

    Args:
        shares: [n], each finite and >= 0; normalised here over the active sources.
        carry: [n], groups owed from the batches before; finite, cut to whole units if it is not from here.
        size: groups of the batch, at least 1.
        active: [n], whether a source takes part; ``None``: all do.
        limits: [n], the most groups that a source can give; ``None`` for no limit.

    Returns:
        Counts and new carry. All counts are 0 and the carry is unchanged when no active source has a share above 0.

    Raises:
        ValueError: an argument is out of range or of another length.
    """
    n = len(shares)
    _check(shares, carry, size, active, limits)
    poured, cups = list(shares), list(range(n))
    if active is not None and not all(active):
        poured = [share if is_active else 0.0 for share, is_active in zip(shares, active, strict=True)]
        cups = [i for i in cups if active[i]]
    caps = {i: limit for i, limit in enumerate(limits or ()) if limit is not None}
    counts = [0] * n
    if not any(poured):
        return Apportionment(tuple(counts), tuple(carry))
    owed = [int(value * _UNITS_PER_GROUP) for value in carry]
    _pour(owed, poured, size * _UNITS_PER_GROUP)
    _empty(owed, poured, counts, cups, caps, size)
    return Apportionment(tuple(counts), tuple(value / _UNITS_PER_GROUP for value in owed))


def _check(
    shares: Sequence[float],
    carry: Sequence[float],
    size: int,
    active: Sequence[bool] | None,
    limits: Sequence[int | None] | None,
) -> None:
    lengths = [len(values) for values in (shares, carry, active, limits) if values is not None]
    if min(lengths) != max(lengths):
        found = ", ".join(map(str, lengths))
        raise ValueError(f"shares, carry, active and limits need one entry per source, not {found}")
    if size < 1:
        raise ValueError(f"a batch needs at least 1 group, not {size}")
    if not (all(map(math.isfinite, shares)) and min(shares, default=0.0) >= 0.0):
        raise ValueError(f"shares must be finite and at least 0, not {list(shares)}")
    if not all(map(math.isfinite, carry)):
        raise ValueError(f"carries must be finite, not {list(carry)}")
    if limits is not None and any(limit is not None and limit < 0 for limit in limits):
        raise ValueError(f"limits must be at least 0, not {list(limits)}")


def _pour(owed: list[int], shares: Sequence[float], units: int) -> None:
    """Add exactly ``units`` to ``owed``, in proportion to ``shares``, of which one is above 0.

    What rounding leaves over or takes too much goes to the largest share.
    """
    largest = max(shares)
    scaled = [share / largest for share in shares]  # the sum of the shares themselves could overflow
    total = math.fsum(scaled)
    units_per_share = units / total
    parts = [round(units_per_share * share) for share in scaled]
    parts[scaled.index(1.0)] += units - sum(parts)
    owed[:] = map(operator.add, owed, parts)


def _empty(
    owed: list[int],
    shares: Sequence[float],
    counts: list[int],
    cups: Sequence[int],
    caps: dict[int, int],
    size: int,
) -> None:
    """Take ``size`` groups from the cups, fill ``counts`` and leave in ``owed`` what is owed afterwards.

    ``caps`` are the limits of cups that have one. Cups that are over it are closed at it and their claims poured into
    the others, until none is: at most n rounds, and one where nothing is limited. A cup of share 0 has the whole groups
    of what it is owed as its limit, so that it does not stand in for exhausted sources.
    """
    if 0.0 in shares:
        for i in cups:
            if shares[i] == 0.0:
                caps[i] = min(max(0, -(-owed[i] // _UNITS_PER_GROUP)), caps.get(i, size))
        cups = [i for i in cups if shares[i] > 0.0 or owed[i] > 0]
    while True:
        taken = _take(owed, cups, size)
        over = [i for i, cap in caps.items() if taken[i] > cap]
        if not over:
            break
        cups = [i for i in cups if i not in over]
        claim = 0
        for i in over:
            counts[i] = caps[i]
            size -= counts[i]
            claim += owed[i] - counts[i] * _UNITS_PER_GROUP
            owed[i] = 0
        others = [share if i in cups else 0.0 for i, share in enumerate(shares)]
        if any(others):
            _pour(owed, others, claim)
    for i, count in enumerate(taken):
        if count:
            counts[i] = count
            owed[i] -= count * _UNITS_PER_GROUP


def _take(owed: Sequence[int], cups: Sequence[int], size: int) -> list[int]:
    """[n] how often each is the fullest of ``cups`` when ``size`` groups are taken one at a time from the fullest.

    Computed without going one at a time: first every whole group that is owed, then one more from each of the fullest
    rests, if none of them is the fullest twice; else single groups, one more from the fullest rest or one back from the
    emptiest, until the sum is right. O((n + d) log n) with d the corrections, fewer than n as long as carries add up
    to 0.
    """
    taken = [0] * len(owed)
    if not cups:
        return taken
    for i in cups:
        if owed[i] >= _UNITS_PER_GROUP:
            taken[i] = min(size, owed[i] // _UNITS_PER_GROUP)
    missing = size - sum(taken)
    if missing == 0:
        return taken
    rests = [units - count * _UNITS_PER_GROUP for units, count in zip(owed, taken, strict=True)]
    if 0 < missing <= len(cups):
        fullest = sorted(cups, key=rests.__getitem__, reverse=True)  # stable: of equal ones the lower index first
        if rests[fullest[missing - 1]] > rests[fullest[0]] - _UNITS_PER_GROUP:
            for i in fullest[:missing]:
                taken[i] += 1
            return taken
    _correct(taken, rests, cups, missing)
    return taken


def _correct(taken: list[int], rests: Sequence[int], cups: Sequence[int], missing: int) -> None:
    """Take ``missing`` more groups one at a time, or give so many back if it is below 0."""
    if missing > 0:
        fullest = [(-rests[i], i) for i in cups]
        heapq.heapify(fullest)
        for _ in range(missing):
            emptiness, i = fullest[0]
            taken[i] += 1
            heapq.heapreplace(fullest, (emptiness + _UNITS_PER_GROUP, i))
        return
    emptiest = [(rests[i], -i) for i in cups if taken[i]]
    heapq.heapify(emptiest)
    for _ in range(-missing):
        rest, negative = emptiest[0]
        taken[-negative] -= 1
        if taken[-negative]:
            heapq.heapreplace(emptiest, (rest + _UNITS_PER_GROUP, negative))
        else:
            heapq.heappop(emptiest)
