"""A sample of ``scripts/compare-plans``: working to the plan beats buffers of fixed size and in proportion."""

from __future__ import annotations

from tests.campaigns.plan_comparison import CROSSINGS, compare

STEPS = 60


def test_the_plan_spares_waiting_and_waste() -> None:
    """On a curriculum that crosses over; the same number of groups buffered in each way."""
    outcomes = compare(STEPS, seed=1)
    assert {outcome.trained for outcome in outcomes.values()} == {STEPS * CROSSINGS.batch_size}
    plan = outcomes.pop("plan")
    for name, other in outcomes.items():
        assert plan.waited_s < other.waited_s, name
        assert plan.wasted < other.wasted / 2, name
        assert plan.stale <= other.stale, name


def test_a_comparison_can_be_had_again() -> None:
    assert compare(4, 3) == compare(4, 3)
