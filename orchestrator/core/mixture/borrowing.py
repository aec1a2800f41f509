"""Others stand in for a source that keeps a batch waiting, and are paid back (``starvation: {policy: borrow}``).

A source's *debt* is how many groups others have given in its place and have not been given back for; theirs is negative
by as much. It is kept apart from the carried remainder (``apportionment.py``), so that what a source is owed, exactly,
is ``carry + debt``.

Invariants:

* Debts add up to 0, exactly, but for sources that were removed since (they are multiples of ``UNIT``, as carries are).
* The positive ones together never exceed one batch: then the batch waits, as under ``wait``.
* Nothing is borrowed from a source without a weight, nor from one that is short itself.
* Debt is paid back by moving it into the carries, at most :data:`REPAID_PER_BATCH` of a batch at a time: the coming
  batches then give the debtors more and the others less, by the rule that shares out everything else.
* A source gives back at most its share of a batch in a batch. What is poured into the cups is then a division of a
  batch as any other, so that the carries keep their bound. One whose weight is 0 gives nothing back meanwhile.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

from .apportionment import UNIT, apportion

__all__ = ["REPAID_PER_BATCH", "Loan", "repay", "stand_in"]

REPAID_PER_BATCH: Final = 0.25
"""Of a batch, at least one group. A source that was down for long comes back over several batches: at once, a batch
would be all of one source, which is not the mixture that anybody asked for."""


@dataclass(frozen=True, slots=True)
class Loan:
    """A batch in which others stand in.

    ``counts`` are the groups that each source gives, ``debt`` what each has afterwards; ``is_there``: every source has
    its count.
    """

    counts: dict[str, int]
    debt: dict[str, float]
    is_there: bool


def stand_in(
    counts: Mapping[str, int],
    shares: Mapping[str, float],
    *,
    takeable: Mapping[str, int],
    limits: Mapping[str, int],
    debt: Mapping[str, float],
    size: int,
) -> Loan | str:
    """Let others give what some sources lack, in proportion to their shares.

    Args:
        counts: groups of each source that the batch asks for.
        shares: normalised weights; a source that takes no part has 0.
        takeable: groups of each source that can be handed out now.
        limits: of sources that will have no more, how many they have in all.
        debt: as it is.
        size: groups of a batch.

    Returns:
        The loan; or why there is none, as the end of a sentence.
    """
    lacking = {name: count - takeable[name] for name, count in counts.items() if takeable[name] < count}
    missing, owing = sum(lacking.values()), sum(groups for groups in debt.values() if groups > 0)
    if not missing:
        return Loan(dict(counts), dict(debt), is_there=True)
    if missing > size - owing:
        return f"other sources may owe at most one batch, and {owing:.4g} of {size} groups are not paid back yet"
    lenders = [name for name, share in shares.items() if share > 0 and name not in lacking]
    for is_there in (True, False):
        spare = {name: takeable[name] - counts[name] for name in lenders}
        more = {name: limits[name] - counts[name] for name in lenders if name in limits}
        given = apportion(
            [shares[name] for name in lenders],
            [0.0] * len(lenders),
            missing,
            limits=[(spare if is_there else more).get(name) for name in lenders],
        )
        if sum(given.counts) == missing:
            changes = {name: -groups for name, groups in zip(lenders, given.counts, strict=True)} | lacking
            return Loan(
                {name: count - changes.get(name, 0) for name, count in counts.items()},
                {name: debt.get(name, 0.0) + changes.get(name, 0) for name in counts},
                is_there,
            )
    return "no other source with a weight can fill in"


def repay(
    carry: Mapping[str, float],
    debt: Mapping[str, float],
    shares: Mapping[str, float],
    size: int,
    *,
    gone: Collection[str] = (),
) -> tuple[dict[str, float], dict[str, float]]:
    """Move debt into the carries before a batch is apportioned; both keep their sums.

    Args:
        carry: groups owed to each source.
        debt: of each source.
        shares: normalised weights; the debts of sources that take no part, which have 0, wait.
        size: groups of a batch.
        gone: sources that will never have a group again; their debts are over.

    Returns:
        Carries and debts, with the names of ``debt``.
    """
    carry, debt = dict(carry), _balanced({name: 0.0 if name in gone else groups for name, groups in debt.items()})
    allowance = max(1, int(size * REPAID_PER_BATCH))
    able = {name: min(-debt[name], _whole_units(size * shares[name])) for name in debt if debt[name] < 0}
    owing = {name: debt[name] for name in debt if debt[name] > 0 and shares[name] > 0}
    amount = min(float(allowance), sum(able.values()), sum(owing.values()))
    for claims, sign in ((owing, 1.0), (able, -1.0)):
        for name, groups in _largest_first(claims, amount).items():
            carry[name] += sign * groups
            debt[name] -= sign * groups
    return carry, debt


def _largest_first(claims: Mapping[str, float], amount: float) -> dict[str, float]:
    """Share an amount out, the largest claims whole."""
    parts = {}
    for name in sorted(claims, key=lambda name: -claims[name]):
        parts[name] = min(claims[name], amount)
        amount -= parts[name]
    return parts


def _balanced(debt: dict[str, float]) -> dict[str, float]:
    """Debts that add up to 0: those that have nobody at the other end any more are over."""
    excess = sum(debt.values())
    sign = 1.0 if excess > 0 else -1.0
    over = _largest_first({name: sign * groups for name, groups in debt.items() if sign * groups > 0}, abs(excess))
    return {name: groups - sign * over.get(name, 0.0) for name, groups in debt.items()}


def _whole_units(groups: float) -> float:
    """Cut to a multiple of UNIT, of which sums are exact."""
    return int(groups / UNIT) * UNIT
