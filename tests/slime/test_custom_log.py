"""The metrics of each source and the reward caps, as slime calls them."""

from __future__ import annotations

import importlib
import logging
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import FilterError, SourceUnknown
from orchestrator.slime.custom_log import custom_rollout_log_function, rollout_metrics
from orchestrator.slime.reward_cap_filter import check_reward_cap_per_source
from orchestrator.slime.samples import Sample
from tests.support.slime_side import write_stand_in

ARGS = {
    "prompt_data": ["math.jsonl", "math_hard.jsonl", "code.jsonl"],
    "data_source_weights": ["lambda step: 1 + step", 1, 0],
}


@pytest.fixture
def slime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    write_stand_in(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("slime.utils.tracking_utils")
    for name in [name for name in sys.modules if name.partition(".")[0] == "slime"]:
        del sys.modules[name]


def sample(source: str | None, length: int, reward: Any, *, step: int = 0) -> Sample:
    tags = {} if source is None else {"data_source": source, "data_source_rollout_step": step}
    return Sample(response_length=length, reward=reward, metadata=tags)


SAMPLES = [
    sample("math", 10, 1.0),
    sample("math", 30, 0.0),
    sample("math_hard", 100, 0.5),
    sample("math", 20, 1.0),
    sample("math", 25, None),
]

EXPECTED = {
    "rollout/math/weight": 0.75,
    "rollout/math/sample_count": 4,
    "rollout/math/response_len/mean": 21.25,
    "rollout/math/response_len/median": 22.5,
    "rollout/math/response_len/max": 30,
    "rollout/math/response_len/min": 10,
    "rollout/math/raw_reward/mean": pytest.approx(2 / 3),
    "rollout/math/raw_reward/median": 1,
    "rollout/math/raw_reward/max": 1,
    "rollout/math/raw_reward/min": 0,
    "rollout/math_hard/weight": 0.25,
    "rollout/math_hard/sample_count": 1,
    **{f"rollout/math_hard/response_len/{kind}": 100 for kind in ("mean", "median", "max", "min")},
    **{f"rollout/math_hard/raw_reward/{kind}": 0.5 for kind in ("mean", "median", "max", "min")},
    "rollout/code/weight": 0.0,
    "rollout/code/sample_count": 0,
}


# -- metrics ----------------------------------------------------------------------------------------------------------


def test_the_metrics_have_the_names_of_the_format() -> None:
    assert rollout_metrics(SAMPLES, {"math": 0.75, "math_hard": 0.25, "code": 0.0}) == EXPECTED


def test_defect_math_counted_math_hard_as_well() -> None:
    metrics = rollout_metrics([sample("math_hard", 5, 1.0)], {"math": 0.5, "math_hard": 0.5})
    assert (metrics["rollout/math/sample_count"], metrics["rollout/math_hard/sample_count"]) == (0, 1)


def test_defect_filtered_sources_vanished_from_the_log() -> None:
    assert rollout_metrics([], {"math": 0.5, "code": 0.5}) == {
        "rollout/math/weight": 0.5,
        "rollout/math/sample_count": 0,
        "rollout/code/weight": 0.5,
        "rollout/code/sample_count": 0,
    }


def test_a_failed_generation_is_no_reward_of_zero() -> None:
    metrics = rollout_metrics([sample("math", 5, None), sample("math", 5, float("nan"))], {"math": 1.0})
    assert metrics["rollout/math/sample_count"] == 2
    assert not any("raw_reward" in name for name in metrics)


def test_rewards_that_are_dictionaries() -> None:
    samples = [sample("math", 1, {"acc": 1, "style": 5}), sample("math", 1, {"acc": 0, "style": 5})]
    assert rollout_metrics(samples, {"math": 1.0}, reward_key="acc")["rollout/math/raw_reward/mean"] == 0.5
    assert "rollout/math/raw_reward/mean" not in rollout_metrics(samples, {"math": 1.0})


def test_groups_and_fans_are_flattened() -> None:
    nested = [[sample("math", 1, 1.0)], [[sample("math", 2, 1.0)], [sample("math", 3, 1.0)]]]
    assert rollout_metrics(nested, {"math": 1.0})["rollout/math/response_len/max"] == 3


# -- the hook ---------------------------------------------------------------------------------------------------------


def test_without_slime_the_numbers_are_logged_and_handed_on(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    args, extra = Namespace(**ARGS), {"rollout/dynamic_filter/drop_zero_std": 2}
    assert custom_rollout_log_function(2, args, SAMPLES, extra, 1.5) is False, "slime's own metrics go on"
    assert extra == {"rollout/dynamic_filter/drop_zero_std": 2, **EXPECTED}
    (record,) = caplog.records
    assert "rollout 2: " in record.getMessage()
    assert "'rollout/code/sample_count': 0" in record.getMessage()
    assert args.data_source_batches_formed == 3


def test_with_slime_the_numbers_go_into_its_row(slime: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    extra: dict[str, Any] = {}
    assert custom_rollout_log_function(2, Namespace(**ARGS), SAMPLES, extra, 1.5) is False
    assert extra == EXPECTED
    assert slime.ROWS == [], "slime logs them itself, in its own row"
    assert not caplog.records


def test_where_slime_gives_no_metrics_they_are_tracked(slime: Any) -> None:
    assert custom_rollout_log_function(2, Namespace(**ARGS), SAMPLES, None, 1.5) is False
    assert slime.ROWS == [({**EXPECTED, "rollout/step": 20}, "rollout/step")]


def test_samples_of_nobody_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    strangers = [sample("maths", 1, 1.0), sample(None, 1, 1.0)]
    custom_rollout_log_function(2, Namespace(**ARGS), SAMPLES + strangers, (extra := {}), 1.0)
    (record,) = caplog.records
    assert "2 samples are not counted" in record.getMessage()
    assert "'maths', None" in record.getMessage()
    assert extra == EXPECTED


def test_a_weight_that_fails_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    args = Namespace(prompt_data=["a", "b"], data_source_weights=[1, "lambda step: 1 / (2 - step)"])
    custom_rollout_log_function(2, args, [], (extra := {}), 1.0)
    assert "weight of b at step 2" in caplog.records[0].getMessage()
    assert extra["rollout/b/weight"] == 0.5, "the last good weight is kept"


def test_wrong_options_are_value_errors() -> None:
    with pytest.raises(ValueError, match="1 weights for 2 sources"):
        custom_rollout_log_function(0, Namespace(prompt_data=["a", "b"], data_source_weights=[1]), [], {}, 1.0)
    with pytest.raises(ValueError, match="1 reward caps for 2 sources"):
        check_reward_cap_per_source(Namespace(prompt_data=["a", "b"], data_source_reward_caps=[1]), SAMPLES)


# -- reward caps ------------------------------------------------------------------------------------------------------


def caps(*values: Any, **options: Any) -> Namespace:
    return Namespace(prompt_data=["math", "code"], data_source_reward_caps=list(values), **options)


@pytest.mark.parametrize(
    ("cap", "step", "keep"),
    [
        (0.5, 0, True),
        (0.49, 0, False),
        (None, 0, True),
        ("lambda step: 0.6 - step / 10", 1, True),
        ("lambda step: 0.6 - step / 10", 2, False),
        ("orchestrator.weight_scheduler.level_increasing", 0, True),
    ],
)
def test_a_group_above_its_cap_is_dropped(cap: Any, step: int, keep: bool) -> None:
    group = [sample("math", 1, 1.0, step=step), sample("math", 1, 0.0, step=step)]
    verdict = check_reward_cap_per_source(caps(cap, 0), group, whatever=1)
    assert (verdict.keep, verdict.reason) == (keep, None if keep else "reward_cap_math")


def test_caps_read_the_named_reward() -> None:
    group = [sample("code", 1, {"acc": 1.0})]
    assert not check_reward_cap_per_source(caps(None, 0.5, reward_key="acc"), group).keep
    with pytest.raises(FilterError, match="1 of 1 samples of code have no numeric reward"):
        check_reward_cap_per_source(caps(None, 0.5), group)
    assert check_reward_cap_per_source(caps(None, None), group).keep, "without a cap nothing is looked at"


def test_caps_of_nobody() -> None:
    with pytest.raises(SourceUnknown, match="one of math, code; it is 'maths'"):
        check_reward_cap_per_source(caps(1, 1), [sample("maths", 1, 1.0)])
    untagged = Sample(reward=1.0, metadata={"data_source": "math"})
    with pytest.raises(FilterError, match="no data_source_rollout_step"):
        check_reward_cap_per_source(caps(1, 1), [untagged])


@pytest.mark.usefixtures("slime")
def test_the_verdict_is_of_slimes_type() -> None:
    verdict = check_reward_cap_per_source(caps(0.5, None), [sample("math", 1, 1.0)])
    assert (type(verdict).__name__, verdict.keep, verdict.reason) == ("DynamicFilterOutput", False, "reward_cap_math")
