"""Weights in all their forms, and the table: normalised, kept when they fail, the same whoever asked first."""

from __future__ import annotations

import asyncio
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.core.weights.forms import Weight, parse_weight
from orchestrator.core.weights.table import MAX_LOOK_BACK_STEPS, MAX_REMEMBERED_STEPS, WeightTable
from orchestrator.errors import DottedPathError, ExpressionError, SourceUnknown, WeightError

BAD_BELOW_10 = "lambda step: 0.5 if step >= 10 else -1"


def weight_of(function: Callable[[int], Any], text: str = "user.function") -> Weight:
    return Weight(text, "function", function)


def table_of(*values: float | str) -> WeightTable:
    names = ["easy", "hard", "code"][: len(values)]
    return WeightTable(names, [parse_weight(value) for value in values])


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    path = list(sys.path)
    (tmp_path / "own_schedules.py").write_text(
        "def half(step):\n    return 0.5\n\n"
        "async def later(step):\n    return 0.5\n\n"
        "def two(step, other):\n    return 0.5\n\n"
        "class Ramp:\n    def __call__(self, step):\n        return step / 10\n\n"
        "ramp = Ramp()\n"
    )
    yield tmp_path
    sys.path[:] = path
    sys.modules.pop("own_schedules", None)


# -- one weight -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "kind", "text", "at_100"),
    [
        (0.3, "constant", "0.3", 0.3),
        (1, "constant", "1", 1.0),
        (0, "constant", "0", 0.0),
        (" 0.25 ", "constant", "0.25", 0.25),
        ("lambda step: 0.5 + step/2000", "lambda", "lambda step: 0.5 + step/2000", 0.55),
        ("own_schedules.half", "function", "own_schedules.half", 0.5),
        ("own_schedules.ramp", "function", "own_schedules.ramp", 10.0),
        ("orchestrator.weight_scheduler.easy_to_hard", "function", "orchestrator.weight_scheduler.easy_to_hard", 0.5),
    ],
)
def test_forms(directory: Path, written: float | str, kind: str, text: str, at_100: float) -> None:
    weight = parse_weight(written, directory=directory)
    assert (weight.kind, weight.text, weight(100)) == (kind, text, pytest.approx(at_100))


@pytest.mark.parametrize(
    ("written", "error", "message"),
    [
        (-0.1, WeightError, "the weight is -0.1"),
        (math.nan, WeightError, "the weight is nan"),
        (math.inf, WeightError, "the weight is inf"),
        (10**400, WeightError, "the weight is inf"),
        ("-1", WeightError, "the weight is -1.0"),
        ("nan", WeightError, "the weight is nan"),
        (True, WeightError, "not 'True'"),
        (None, WeightError, "not 'None'"),
        ([0.5], WeightError, "a number, a lambda or a dotted path"),
        ("half", WeightError, "'half' is not a number"),
        ("", WeightError, "'' is not a number"),
        ("lambda step: foo", ExpressionError, "foo is unknown"),
        ("lambda x: 1", ExpressionError, "exactly this one parameter"),
        ("own_schedules.hlf", DottedPathError, "did you mean half"),
        ("own_schedules.later", WeightError, "is asynchronous"),
        ("own_schedules.two", WeightError, "cannot be called with only the step"),
        ("own_schedules.Ramp", WeightError, "cannot be called with only the step"),
    ],
)
def test_what_is_no_weight(directory: Path, written: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        parse_weight(written, directory=directory)


@pytest.mark.parametrize("result", [-1, -1e-9, math.nan, math.inf, -math.inf, None, "0.5", b"1", [1.0], 1j, 10**400])
def test_results_that_are_not_finite_and_positive_are_errors(result: Any) -> None:
    with pytest.raises(WeightError, match=r"user\.function at step 7 gives"):
        weight_of(lambda _: result)(7)


@pytest.mark.parametrize("result", [0, 2, 0.5, True])
def test_results_are_floats(result: Any) -> None:
    assert type(weight_of(lambda _: result)(7)) is float


def test_what_a_function_raises_is_chained_and_named() -> None:
    with pytest.raises(WeightError, match=r"user\.function raised KeyError at step 3: 'x'") as caught:
        weight_of(lambda _: {}["x"])(3)
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize("error", [asyncio.CancelledError, SystemExit, GeneratorExit])
def test_a_function_can_neither_cancel_nor_end_who_calls_it(error: type[BaseException]) -> None:
    def function(_: int) -> float:
        raise error

    with pytest.raises(WeightError, match=rf"user\.function raised {error.__name__} at step 3"):
        weight_of(function)(3)


# -- the table --------------------------------------------------------------------------------------------------------


def test_the_mixed_example_of_the_documentation() -> None:
    row = table_of(0.3, "lambda step: 0.5 + step/2000", "orchestrator.weight_scheduler.hard_to_easy").at(100)
    assert row.raw == pytest.approx({"easy": 0.3, "hard": 0.55, "code": 0.5})
    assert row.shares == pytest.approx({"easy": 0.3 / 1.35, "hard": 0.55 / 1.35, "code": 0.5 / 1.35})
    assert row.warnings == ()


def test_shares_are_normalised_over_the_active_sources() -> None:
    table = table_of(1, 2, 5)
    assert table.at(0, active={"easy", "hard"}).shares == pytest.approx({"easy": 1 / 3, "hard": 2 / 3, "code": 0.0})
    assert table.at(0, active=[]).shares == {"easy": 0.0, "hard": 0.0, "code": 0.0}
    assert table.at(0, active=[]).raw == {"easy": 1.0, "hard": 2.0, "code": 5.0}
    assert table_of(0, 0).at(0).shares == {"easy": 0.0, "hard": 0.0}


@given(st.lists(st.floats(0.0, allow_infinity=False, allow_nan=False), min_size=1, max_size=3))
def test_shares_of_any_magnitude_sum_to_one(values: list[float]) -> None:
    shares = table_of(*values).at(0).shares
    assert sum(shares.values()) == pytest.approx(1.0 if any(values) else 0.0)
    assert all(0.0 <= share <= 1.0 for share in shares.values())


def test_a_failing_weight_keeps_its_last_good_value_with_a_warning() -> None:
    table = table_of("lambda step: 1 / (2 - step)", 1)
    assert table.at(1).raw["easy"] == 1.0
    row = table.at(2)
    assert row.raw["easy"] == 1.0
    assert len(row.warnings) == 1
    assert row.warnings[0].startswith("weight of easy at step 2: 'lambda step: 1 / (2 - step)' has no value at step 2")
    assert row.warnings[0].endswith("the last good value 1 is used instead")
    assert table.at(50).raw["easy"] == 1.0  # negative from step 3 on
    assert table.at(2) == row


def test_a_weight_without_a_good_value_counts_as_zero() -> None:
    row = table_of(BAD_BELOW_10, 1).at(9)
    assert row.shares == {"easy": 0.0, "hard": 1.0}
    assert "weight of easy at step 9" in row.warnings[0]
    assert row.warnings[0].endswith("0 is used instead")


def test_looking_ahead_never_stands_in_for_an_earlier_step() -> None:
    table = table_of(BAD_BELOW_10, 1)
    assert table.at(10).raw["easy"] == 0.5
    assert table.at(9).raw["easy"] == 0.0


@given(
    failing=st.sets(st.integers(0, 40), max_size=30),
    asked=st.lists(st.integers(0, 40), min_size=1, max_size=30),
)
def test_values_do_not_depend_on_what_was_asked_before(failing: set[int], asked: list[int]) -> None:
    """The oracle: the value at the latest step that does not fail. A new table is a restart."""

    def schedule(step: int) -> float:
        if step in failing:
            raise RuntimeError("no value")
        return step + 1.0

    table = WeightTable(["easy"], [weight_of(schedule)])
    for step in asked:
        good = [earlier for earlier in range(step + 1) if earlier not in failing]
        expected = good[-1] + 1.0 if good else 0.0
        assert table.at(step).raw["easy"] == expected
        assert bool(table.at(step).warnings) is (step in failing)


def test_looking_back_is_bounded() -> None:
    asked: list[int] = []

    def schedule(step: int) -> float:
        asked.append(step)
        return math.nan

    WeightTable(["easy"], [weight_of(schedule)]).at(10**9)
    assert len(asked) == MAX_LOOK_BACK_STEPS + 1


def test_weights_are_evaluated_once_a_step_and_memory_is_bounded() -> None:
    asked: list[int] = []

    def schedule(step: int) -> float:
        asked.append(step)
        return 1.0 if step < 5 else math.nan

    table = WeightTable(["easy"], [weight_of(schedule)])
    for step in range(3 * MAX_REMEMBERED_STEPS):
        for ahead in (step, step + 1, step):
            assert table.at(ahead).raw["easy"] == 1.0
    assert sorted(asked) == list(range(3 * MAX_REMEMBERED_STEPS + 1))
    assert len(table._configured["easy"]._known) <= MAX_REMEMBERED_STEPS


def test_rows_are_remembered_for_the_sources_that_take_part() -> None:
    table = table_of(1, 2, 5)
    row, partly = table.at(3), table.at(4, active=["easy", "code"])
    assert table.at(3, active=["easy", "hard", "code"]) is row
    assert table.at(4, active=["code", "easy"]) is partly
    assert table.at(4).shares["hard"] == 0.25
    assert table.at(4, active=["easy", "code"]) == partly
    for step in range(5, 5 + MAX_REMEMBERED_STEPS):
        table.at(step)
    assert len(table._rows) <= MAX_REMEMBERED_STEPS
    assert table.at(3) == row


def test_weights_set_at_run_time() -> None:
    table = table_of(1, 1)
    revision = table.revision
    table.set("hard", parse_weight("lambda step: 3"))
    assert table.at(0).shares == {"easy": 0.25, "hard": 0.75}
    assert table.weight("hard").text == "lambda step: 3"
    assert table.revision > revision
    table.set("hard", None)
    assert table.at(0).shares == {"easy": 0.5, "hard": 0.5}
    table.set("hard", None)


def test_a_changed_config_replaces_the_weights_but_those_set_at_run_time() -> None:
    table = table_of(1, 1, 1)
    table.set("easy", parse_weight(7))
    table.set("hard", parse_weight(8))
    revision = table.revision
    table.replace(["easy", "new"], [parse_weight(2), parse_weight(3)])
    assert table.revision > revision
    assert table.at(0).raw == {"easy": 7.0, "new": 3.0}
    table.set("easy", None)
    assert table.at(0).raw["easy"] == 2.0


def test_unknown_sources_and_wrong_numbers_of_weights() -> None:
    table = table_of(1, 1)
    with pytest.raises(SourceUnknown, match="'maths'; the sources are easy, hard"):
        table.set("maths", parse_weight(1))
    with pytest.raises(SourceUnknown):
        table.weight("maths")
    with pytest.raises(WeightError, match="1 weights for 2 sources"):
        table.replace(["easy", "hard"], [parse_weight(1)])
    assert table.at(0).shares == {"easy": 0.5, "hard": 0.5}
    with pytest.raises(WeightError, match="1 weights for 2 sources"):
        WeightTable(["easy", "hard"], [parse_weight(1)])
