"""Plans are what the batches will be, and launching keeps its bound without ever starving the next batch."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.core.mixture.plan import (
    MIN_ACCEPTANCE,
    LaunchOrder,
    PlannedBatch,
    forecast,
    launches,
    production_horizon,
)
from orchestrator.core.weights.forms import parse_weight
from orchestrator.core.weights.table import WeightTable

NAMES = ("easy", "hard", "code")


def table_of(*values: float | str) -> WeightTable:
    return WeightTable(NAMES[: len(values)], [parse_weight(value) for value in values])


def plan_of(table: WeightTable, **changes: object) -> tuple[PlannedBatch, ...]:
    settings: dict = {"step": 0, "carry": {}, "size": 8, "horizon": 3, "active": table.names} | changes
    return forecast(table, **settings)


def test_a_forecast_follows_the_schedule_and_the_carry() -> None:
    plan = plan_of(table_of("lambda step: 1 - step / 4", "lambda step: step / 4"), horizon=5, size=6)
    assert [batch.step for batch in plan] == [0, 1, 2, 3, 4]
    assert [batch.counts for batch in plan] == [
        {"easy": 6, "hard": 0},
        {"easy": 5, "hard": 1},
        {"easy": 3, "hard": 3},
        {"easy": 1, "hard": 5},
        {"easy": 0, "hard": 6},
    ]
    assert plan[1].shares == {"easy": 0.75, "hard": 0.25}
    assert plan[1].carry == {"easy": -0.5, "hard": 0.5}


@given(
    st.lists(st.floats(0.01, 1.0), min_size=3, max_size=3),
    st.integers(1, 40),
    st.integers(1, 6),
    st.dictionaries(st.sampled_from(NAMES), st.integers(0, 60)),
)
def test_planning_ahead_is_planning_again_after_each_batch(
    values: list[float], size: int, horizon: int, limits: dict[str, int]
) -> None:
    table = table_of(*values)
    ahead = plan_of(table, size=size, horizon=horizon, limits=limits)
    carry: dict[str, float] = {}
    left = dict(limits)
    for i, planned in enumerate(ahead):
        (batch,) = plan_of(table, step=i, carry=carry, size=size, horizon=1, limits=left)
        assert batch == planned
        carry = batch.carry
        left = {name: limit - batch.counts[name] for name, limit in left.items()}
        assert all(limit >= 0 for limit in left.values())


@given(
    st.lists(st.floats(0.01, 1.0), min_size=3, max_size=3),
    st.sampled_from(("nothing", "weight", "size", "paused", "carry", "debt", "limit")),
)
def test_an_earlier_plan_changes_nothing_but_the_work(values: list[float], change: str) -> None:
    """What is still true of it is taken over as it is, and whatever a batch depends on makes it a new one."""
    table = table_of(*values)
    earlier = plan_of(table)
    if change == "weight":
        table.set("easy", parse_weight(2 * values[0]))
    facts = {
        "nothing": {},
        "weight": {},
        "size": {"size": 9},
        "paused": {"active": ["easy", "code"]},
        "carry": {"carry": {"easy": 0.5, "code": -0.5}},
        "debt": {"debt": {"easy": 2.0, "code": -2.0}},
        "limit": {"limits": {"easy": 1}},
    }[change]
    facts = {"step": 1, "carry": earlier[0].carry} | facts
    again = plan_of(table, **facts, earlier=earlier)
    assert again == plan_of(table, **facts)
    assert (again[0] is earlier[1] and again[1] is earlier[2]) == (change == "nothing")


def test_an_earlier_plan_is_kept_while_a_source_is_paused() -> None:
    table, active = table_of(0.2, 0.5, 0.3), ["easy", "code"]
    earlier = plan_of(table, active=active)
    again = plan_of(table, step=1, carry=earlier[0].carry, active=active, earlier=earlier)
    assert again[:2] == earlier[1:]
    assert all(now is before for now, before in zip(again, earlier[1:], strict=False))


def test_there_is_no_plan_where_no_batch_could_form() -> None:
    assert plan_of(table_of(0, 0)) == ()
    assert plan_of(table_of(1, 0), active=["hard"]) == ()
    assert plan_of(table_of(1, 1), active=[]) == ()
    assert plan_of(table_of(1, 1), horizon=0) == ()
    assert plan_of(table_of(1, 1), limits={"easy": 0, "hard": 0}) == ()
    assert len(plan_of(table_of("lambda step: max(0, 2 - step)", 0), horizon=5)) == 2


def test_a_paused_source_takes_no_part_and_keeps_its_carry() -> None:
    plan = plan_of(table_of(1, 1, 2), carry={"easy": -0.25, "hard": 0.25}, active=["easy", "code"], size=9)
    assert all(batch.counts["hard"] == 0 and batch.shares["hard"] == 0.0 for batch in plan)
    assert all(batch.carry["hard"] == 0.25 for batch in plan)


def test_an_exhausted_source_gives_what_it_has_and_then_counts_as_weight_zero() -> None:
    plan = plan_of(table_of(1, 1, 2), limits={"easy": 3}, horizon=3)
    assert [batch.counts["easy"] for batch in plan] == [2, 1, 0]
    assert [sum(batch.counts.values()) for batch in plan] == [8, 8, 8]
    assert plan[2].shares == pytest.approx({"easy": 0.0, "hard": 1 / 3, "code": 2 / 3})


def test_a_plan_ends_with_the_batch_that_stays_incomplete() -> None:
    plan = plan_of(table_of(1, 1), limits={"easy": 5, "hard": 6}, horizon=9)
    assert [sum(batch.counts.values()) for batch in plan] == [8, 3]
    rising_later = table_of("lambda step: 1 if step == 0 else 0", "lambda step: step")
    assert [batch.counts for batch in plan_of(rising_later, limits={"easy": 5})] == [{"easy": 5, "hard": 0}]


def test_warnings_of_the_weights_travel_with_the_plan() -> None:
    plan = plan_of(table_of("lambda step: 1 / (1 - step)", 1), horizon=2)
    assert plan[0].warnings == ()
    assert "weight of easy at step 1" in plan[1].warnings[0]


@pytest.mark.parametrize(
    ("lookahead", "max_staleness", "horizon"),
    [(2, None, 2), (2, 0, 1), (2, 1, 2), (2, 5, 2), (8, 3, 4), (0, None, 1), (0, 3, 1)],
)
def test_production_horizon(lookahead: int, max_staleness: int | None, horizon: int) -> None:
    assert production_horizon(lookahead, max_staleness) == horizon


# -- launching --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "order"),
    [
        ({"wanted": 10}, LaunchOrder(10)),
        ({"wanted": 10, "buffered": 4, "in_flight": 6}, LaunchOrder(0)),
        ({"wanted": 10, "buffered": 12}, LaunchOrder(0)),
        ({"wanted": 10, "acceptance": 0.5}, LaunchOrder(20)),
        ({"wanted": 10, "acceptance": 0.5, "buffered": 4, "in_flight": 4}, LaunchOrder(8)),
        ({"wanted": 21, "acceptance": 0.7}, LaunchOrder(30)),
        ({"wanted": 10, "acceptance": 0.0}, LaunchOrder(200)),
        ({"wanted": 10, "bound": 6}, LaunchOrder(6)),
        ({"wanted": 10, "bound": 6, "next_count": 6}, LaunchOrder(6)),
        ({"wanted": 10, "bound": 6, "next_count": 8}, LaunchOrder(8, over_bound=True)),
        ({"wanted": 10, "bound": 6, "next_count": 8, "in_flight": 7}, LaunchOrder(1, over_bound=True)),
        ({"wanted": 10, "bound": 6, "next_count": 8, "in_flight": 3, "buffered": 5}, LaunchOrder(0)),
        ({"wanted": 0, "next_count": 0}, LaunchOrder(0)),
    ],
)
def test_launches(facts: dict, order: LaunchOrder) -> None:
    defaults = {"next_count": 0, "buffered": 0, "in_flight": 0, "acceptance": 1.0, "bound": None}
    assert launches(**(defaults | facts)) == order


groups = st.integers(0, 300)


@given(
    wanted=groups,
    next_count=groups,
    buffered=groups,
    in_flight=groups,
    acceptance=st.floats(0.0, 1.0),
    bound=st.one_of(st.none(), groups),
)
def test_launching_keeps_its_bound_and_never_starves_the_next_batch(
    wanted: int, next_count: int, buffered: int, in_flight: int, acceptance: float, bound: int | None
) -> None:
    order = launches(
        wanted=wanted,
        next_count=next_count,
        buffered=buffered,
        in_flight=in_flight,
        acceptance=acceptance,
        bound=bound,
    )
    after = buffered + in_flight + order.count
    acceptance = max(acceptance, MIN_ACCEPTANCE)
    assert order.count >= 0
    assert after >= next_count
    assert order.over_bound is (bound is not None and order.count > 0 and after > bound)
    if order.over_bound:
        assert after == next_count
    if bound is None or after < bound:
        assert buffered + (in_flight + order.count) * acceptance >= wanted - 1e-6
    if order.count > max(0, next_count - buffered - in_flight):
        assert buffered + (in_flight + order.count - 1) * acceptance < wanted
