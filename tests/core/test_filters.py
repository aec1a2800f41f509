"""Verdicts on groups: the built-in filter, filters of the user's, and reward caps."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from orchestrator.core.filters import (
    BUILT_IN_FILTERS,
    RewardCaps,
    Verdict,
    check_reward_nonzero_std,
    load_filter,
)
from orchestrator.errors import DottedPathError, FilterError, WeightError
from orchestrator.records import Sample, SampleStatus
from tests.support.paths import ROOT

KEEP = Verdict(True)


def group(*rewards: float | None) -> list[Sample]:
    return [Sample(index=i, reward=reward) for i, reward in enumerate(rewards)]


@pytest.mark.parametrize("rewards", [(0.0, 0.0), (1.0, 1.0, 1.0), (0.1 + 0.2, 0.3000000000000000444)])
def test_equal_rewards_are_dropped(rewards: Sequence[float]) -> None:
    assert check_reward_nonzero_std(None, group(*rewards)) == Verdict(False, "zero_std")


@pytest.mark.parametrize("rewards", [(0.0, 1.0), (1.0, 1.0, 1.0 + 1e-12), (0.5,)])
def test_different_rewards_and_single_samples_are_kept(rewards: Sequence[float]) -> None:
    assert check_reward_nonzero_std(None, group(*rewards), anything=1) == KEEP


@pytest.mark.parametrize("rewards", [(), (None,), (1.0, None)])
def test_unscored_groups_are_errors_not_verdicts(rewards: Sequence[float | None]) -> None:
    with pytest.raises(FilterError, match="have no reward"):
        check_reward_nonzero_std(None, group(*rewards))


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    path = list(sys.path)
    (tmp_path / "own_filters.py").write_text(
        "import asyncio\n"
        "from types import SimpleNamespace\n"
        "import numpy\n"
        "from orchestrator.filters import Verdict\n"
        "def answer(args, samples, **kw):\n    return args.answer\n\n"
        "def short(args, samples, **kw):\n    return len(samples) < args.most\n\n"
        "def verdict(args, samples, **kw):\n    return Verdict(False, 'own')\n\n"
        "def foreign(args, samples, **kw):\n"
        "    return SimpleNamespace(keep=False, reason='zero std/0.0 ' + 'x' * 200)\n\n"
        "def kept(args, samples, **kw):\n    return SimpleNamespace(keep=numpy.bool_(True), reason=None)\n\n"
        "def array(args, samples, **kw):\n    return numpy.float64(1.0) < numpy.float64(0.5)\n\n"
        "def raises(args, samples, **kw):\n    raise KeyError('x')\n\n"
        "def cancels(args, samples, **kw):\n    raise asyncio.CancelledError\n\n"
        "def leaves(args, samples, **kw):\n    raise SystemExit(3)\n\n"
        "async def later(args, samples, **kw):\n    return True\n"
    )
    yield tmp_path
    sys.path[:] = path
    sys.modules.pop("own_filters", None)


class Args:
    most = 3
    answer: object = None


def test_no_filter_keeps_everything() -> None:
    assert load_filter(None)(None, group(0.0, 0.0)) == KEEP


def test_built_in_filters_go_by_name() -> None:
    for name in BUILT_IN_FILTERS:
        assert load_filter(name)(None, group(1.0, 1.0)) == Verdict(False, "zero_std")


def test_filters_of_the_user(directory: Path) -> None:
    short = load_filter("own_filters.short", directory=directory)
    assert short(Args, group(0.0)) == KEEP
    assert short(Args, group(0.0, 0.0, 0.0)) == Verdict(False, "short")
    assert load_filter("own_filters.verdict", directory=directory)(Args, []) == Verdict(False, "own")
    assert load_filter("own_filters.kept", directory=directory)(Args, []) == KEEP
    assert load_filter("own_filters.array", directory=directory)(Args, []) == Verdict(False, "array")


def test_reasons_become_short_names(directory: Path) -> None:
    verdict = load_filter("own_filters.foreign", directory=directory)(Args, [])
    assert verdict.reason is not None
    assert re.fullmatch(r"zero_std_0\.0_x+", verdict.reason)
    assert len(verdict.reason) == 64


@pytest.mark.parametrize("answer", [None, 1, 0.0, "yes", [], object()])
def test_answers_that_are_no_verdict_are_errors(directory: Path, answer: object) -> None:
    args = Args()
    args.answer = answer
    with pytest.raises(FilterError, match="a bool, or an object with keep and reason"):
        load_filter("own_filters.answer", directory=directory)(args, [])


def test_what_a_filter_raises_is_chained(directory: Path) -> None:
    with pytest.raises(FilterError, match=r"filter own_filters\.raises raised KeyError: 'x'") as caught:
        load_filter("own_filters.raises", directory=directory)(Args, [])
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize("name", ["cancels", "leaves"])
def test_a_filter_can_neither_cancel_nor_end_who_calls_it(directory: Path, name: str) -> None:
    """In a group's task a CancelledError of the filter would pass for the end of the daemon."""
    with pytest.raises(FilterError, match=rf"filter own_filters\.{name} raised"):
        load_filter(f"own_filters.{name}", directory=directory)(Args, [])


def test_filters_that_cannot_be_loaded(directory: Path) -> None:
    with pytest.raises(FilterError, match="neither a built-in filter"):
        load_filter("zero_std")
    with pytest.raises(FilterError, match="asynchronous"):
        load_filter("own_filters.later", directory=directory)
    with pytest.raises(DottedPathError, match="did you mean short"):
        load_filter("own_filters.shot", directory=directory)


# -- caps -------------------------------------------------------------------------------------------------------------


def test_groups_above_the_cap_of_their_source_are_dropped() -> None:
    caps = RewardCaps(["easy", "hard"], [None, "lambda step: 0.5 + step / 100"])
    assert caps.check(0, "easy", group(1.0, 1.0)) == KEEP
    assert caps.check(0, "hard", group(1.0, 0.0)) == KEEP
    assert caps.check(0, "hard", group(1.0, 1.0, 0.0)) == Verdict(False, "reward_cap")
    assert caps.check(20, "hard", group(1.0, 1.0, 0.0)) == KEEP
    assert caps.cap("easy", 0) is None
    assert caps.cap("hard", 20) == 0.7


def test_without_caps_nothing_is_looked_at() -> None:
    for nothing in (None, (), (None, None)):
        assert RewardCaps(["easy", "hard"], nothing).check(0, "hard", group(None)) == KEEP


def test_a_cap_that_fails_keeps_its_last_good_value_and_says_so() -> None:
    caps = RewardCaps(["easy", "hard"], ["lambda step: 1 / (2 - step)", "lambda step: 0 / 0"])
    assert caps.cap("easy", 9) == 1.0
    assert caps.cap("hard", 9) is None
    assert caps.check(9, "hard", group(1.0)) == KEEP
    assert [warning.split(":")[0] for warning in caps.warnings(9)] == [
        "reward cap of easy at step 9",
        "reward cap of hard at step 9",
    ]
    assert len(caps.warnings(0)) == 1


def test_caps_that_cannot_be_used() -> None:
    with pytest.raises(FilterError, match="1 reward caps for 2 sources"):
        RewardCaps(["easy", "hard"], [0.5])
    with pytest.raises(WeightError):
        RewardCaps(["easy"], [-1.0])
    with pytest.raises(FilterError, match="have no reward"):
        RewardCaps(["easy"], [0.5]).check(0, "easy", group(None))


def test_the_example_of_the_page_is_a_filter(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    (block,) = re.findall(r"```python\n(def not_all_truncated.*?)```", page, flags=re.DOTALL)
    (tmp_path / "filters_of_the_page.py").write_text(block)
    chosen = load_filter("filters_of_the_page.not_all_truncated", directory=tmp_path)
    samples = group(1.0, 0.0)
    samples[0].status, samples[1].status = SampleStatus.COMPLETED, SampleStatus.TRUNCATED
    assert chosen(None, samples) == KEEP
    samples[0].status = SampleStatus.TRUNCATED
    assert chosen(None, samples) == Verdict(False, "not_all_truncated")
