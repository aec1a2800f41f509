"""The data source in slime's process: the exact mixture, the step, indices, and groups that come back."""

from __future__ import annotations

import json
import math
import sys
import threading
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.errors import SourceUnknown, WeightError
from orchestrator.slime.custom_log import custom_rollout_log_function
from tests.support.slime_side import DataSource, counted, make_args, plain, sources, steps

SCHEDULES: dict[Any, Callable[[int], float]] = {
    0.3: lambda _: 0.3,
    0.05: lambda _: 0.05,
    "lambda step: 0.9 - 0.8 * min(step / 20, 1.0)": lambda step: 0.9 - 0.8 * min(step / 20, 1.0),
    "lambda step: 1 if step % 5 < 2 else 0": lambda step: 1 if step % 5 < 2 else 0,
    "lambda step: exp(-0.1 * step) + 0.01": lambda step: math.exp(-0.1 * step) + 0.01,
}

weighted = st.lists(st.sampled_from(list(SCHEDULES)), max_size=6).map(lambda more: [0.3, *more])
calls = st.lists(st.integers(0, 9), min_size=1, max_size=20)
of_files = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


def data_source(directory: Path, weights: list[Any], **options: Any) -> DataSource:
    return DataSource(make_args(directory, {f"s{i}": weight for i, weight in enumerate(weights)}, **options))


# -- the mixture ------------------------------------------------------------------------------------------------------


@of_files
@given(weights=weighted, sizes=calls)
def test_the_mixture_is_exact_whatever_the_calls(tmp_path: Path, weights: list[Any], sizes: list[int]) -> None:
    """Against exact fractions: after every group, each source has what it is owed, within the bound of the carry."""
    data = data_source(tmp_path, weights)
    owed, got = [Fraction(0)] * len(weights), [0] * len(weights)
    bound = max(Fraction(1), sum(Fraction(1, k) for k in range(2, len(weights) + 1))) + Fraction(1, 10**6)
    handed_out = 0
    for size in sizes:
        groups = data.get_samples(size)
        assert len(groups) == size
        for source in sources(groups):
            row = [Fraction(SCHEDULES[weight](handed_out // 4)) for weight in weights]
            handed_out += 1
            got[int(source[1:])] += 1
            for i, weight in enumerate(row):
                owed[i] += weight / sum(row)
                assert abs(got[i] - owed[i]) < bound


@of_files
@given(weights=weighted, sizes=calls)
def test_the_size_of_calls_changes_nothing(tmp_path: Path, weights: list[Any], sizes: list[int]) -> None:
    by_calls, by_one = data_source(tmp_path, weights), data_source(tmp_path, weights)
    together = [group for size in sizes for group in by_calls.get_samples(size)]
    singly = [group for _ in range(sum(sizes)) for group in by_one.get_samples(1)]
    assert plain(together) == plain(singly)


def test_defect_a_batch_of_five_had_six_groups_and_a_count_below_zero(tmp_path: Path) -> None:
    data = data_source(tmp_path, [0.3, 0.3, 0.3, 0.1], rollout_batch_size=5)
    first, second = data.get_samples(5), data.get_samples(5)
    assert [len(first), len(second)] == [5, 5]
    assert counted(first + second) == {"s0": 3, "s1": 3, "s2": 3, "s3": 1}


def test_defect_a_small_weight_got_nothing_for_ever(tmp_path: Path) -> None:
    data = data_source(tmp_path, [0.95, 0.05], rollout_batch_size=8)
    groups = [group for _ in range(5) for group in data.get_samples(8)]
    assert counted(groups) == {"s0": 38, "s1": 2}


def test_defect_one_group_a_call_gave_the_larger_source_everything(tmp_path: Path) -> None:
    data = data_source(tmp_path, [0.6, 0.4])
    assert counted([data.get_samples(1)[0] for _ in range(100)]) == {"s0": 60, "s1": 40}


def test_a_weight_of_zero_gets_nothing(tmp_path: Path) -> None:
    assert counted(data_source(tmp_path, [1, 0]).get_samples(50)) == {"s0": 50}


# -- the step ---------------------------------------------------------------------------------------------------------


def test_defect_the_step_counted_calls(tmp_path: Path) -> None:
    by_one = data_source(tmp_path, [1, 1])
    assert steps([by_one.get_samples(1)[0] for _ in range(12)]) == [0] * 4 + [1] * 4 + [2] * 4
    at_once = data_source(tmp_path, [1, 1])
    assert steps(at_once.get_samples(12)) == [0] * 4 + [1] * 4 + [2] * 4
    assert at_once.rollout_step == 3


def test_defect_over_sampling_sped_the_curriculum_up(tmp_path: Path) -> None:
    """What is handed out beyond the batch comes back and is handed out again; it counts once."""
    data = data_source(tmp_path, [1, 1])
    for rollout in range(6):
        groups = data.get_samples(12)
        data.add_samples(groups[4:])
        assert data.rollout_step == (12 + 4 * rollout) // 4


def test_defect_filtering_sped_the_curriculum_up(tmp_path: Path) -> None:
    """With the log function in place the step is slime's rollout, whatever was filtered away on the way."""
    data = data_source(tmp_path, [1, "lambda step: step"])
    trained: list[Any] = []
    for rollout in range(5):
        groups = data.get_samples(4 * (1 + rollout % 3))  # the rest is filtered away and never comes back
        custom_rollout_log_function(rollout, data.args, [s for group in groups[:4] for s in group], {}, 1.0)
        if rollout:
            assert set(steps(groups)) == {rollout}
        trained.append(data.rollout_step)
    assert trained == [1, 2, 3, 4, 5]


@of_files
@given(weights=weighted, sizes=calls, back=st.randoms(use_true_random=False))
def test_what_comes_back_does_not_shift_the_mixture(
    tmp_path: Path, weights: list[Any], sizes: list[int], back: Any
) -> None:
    """The new groups, in their order, are those of a run in which nothing ever came back."""
    data, new = data_source(tmp_path, weights), []
    for size in sizes:
        groups = data.get_samples(size)
        new += [group for group in plain(groups) if group[0]["group_index"] >= len(new)]
        data.add_samples([group for group in groups if back.random() < 0.4])
    assert new == plain(data_source(tmp_path, weights).get_samples(len(new)))


def test_samples_are_tagged(tmp_path: Path) -> None:
    data = data_source(tmp_path, [3, "lambda step: 1 + step"], rollout_batch_size=4)
    groups = data.get_samples(8)
    for group in groups:
        for sample in group:
            tags = sample.metadata
            share = {"s0": 3 / (4 + tags["data_source_rollout_step"])}.get(tags["data_source"])
            assert share is None or tags["data_source_weight"] == pytest.approx(share)
    assert groups[0][0].metadata.keys() == {"row", "data_source", "data_source_weight", "data_source_rollout_step"}


def test_a_step_without_a_weight_is_an_error_and_loses_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = data_source(tmp_path, ["lambda step: 1 if step < 1 else 0", 0])
    groups = data.get_samples(3)
    data.add_samples(groups[:2])
    with pytest.raises(WeightError, match="all weights are 0 at step 1"):
        data.get_samples(4)
    assert data.get_buffer_length() == 2
    assert [group[0].group_index for group in data.get_samples(3)] == [0, 1, 3]


def test_a_weight_that_fails_is_warned_of_once_a_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = data_source(tmp_path, [1, "lambda step: 1 / (1 - step)"])
    data.get_samples(4)
    for _ in range(4):
        data.get_samples(1)
    (record,) = caplog.records
    assert "weight of s1 at step 1" in record.getMessage()


# -- prompts and indices ----------------------------------------------------------------------------------------------


@of_files
@given(weights=weighted, sizes=calls)
def test_defect_indices_collided(tmp_path: Path, weights: list[Any], sizes: list[int]) -> None:
    data = data_source(tmp_path, weights, n_samples_per_prompt=3)
    groups = [group for size in sizes for group in data.get_samples(size)]
    assert [[s.group_index for s in group] for group in groups] == [[i] * 3 for i in range(len(groups))]
    assert [s.index for group in groups for s in group] == list(range(3 * len(groups)))


@pytest.mark.parametrize("shuffle", [False, True])
def test_every_prompt_comes_once_an_epoch(tmp_path: Path, shuffle: bool) -> None:
    data = data_source(tmp_path, [1, 1], rows=7, rollout_shuffle=shuffle)
    rows = [group[0].prompt for group in data.get_samples(42) if group[0].metadata["data_source"] == "s1"]
    epochs = [rows[:7], rows[7:14], rows[14:]]
    in_order = [f"s1 {i}" for i in range(7)]
    assert all(sorted(epoch) == in_order for epoch in epochs)
    assert (epochs[0] == epochs[1] == in_order) is not shuffle
    assert len(data) == 14 == len(data.dataset)


def test_the_order_is_a_function_of_seed_and_source(tmp_path: Path) -> None:
    def prompts(seed: int) -> list[str]:
        data = data_source(tmp_path, [1, 1], rollout_shuffle=True, rollout_seed=seed)
        return [group[0].prompt for group in data.get_samples(14)]

    assert prompts(1) == prompts(1) != prompts(2)
    by_source = [[p.split()[1] for p in prompts(1) if p.startswith(name)] for name in ("s0", "s1")]
    assert by_source[0] != by_source[1]


def test_samples_share_nothing_that_can_be_changed(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "x"}]
    row = {"input": messages, "answer": ["a"], "metadata": {"tests": [1, 2]}}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    data = data_source(tmp_path, [1], prompt_data=str(tmp_path / "rows.jsonl"))
    first, second = data.get_samples(1)[0]
    first.metadata["tests"].clear()
    first.prompt[0]["content"] = first.label[0] = "changed"
    for other in (second, *data.get_samples(1)[0]):
        assert (other.prompt, other.label, other.metadata["tests"]) == (messages, ["a"], [1, 2])


# -- what comes back --------------------------------------------------------------------------------------------------


def test_groups_that_come_back_go_first_and_keep_what_they_have(tmp_path: Path) -> None:
    data = data_source(tmp_path, [1, 1])
    groups = data.get_samples(6)
    groups[4][0].response, groups[4][0].tokens = "half of it", [1, 2, 3]
    data.add_samples([groups[4]])
    data.add_samples([groups[1], groups[2]])
    assert data.get_buffer_length() == 3
    again = data.get_samples(5)
    assert [group[0].group_index for group in again] == [1, 2, 4, 6, 7]
    assert again[2][0] is groups[4][0]
    assert data.get_buffer_length() == 0


def test_defect_a_source_of_weight_zero_stranded_its_partials(tmp_path: Path) -> None:
    data = data_source(tmp_path, [1, "lambda step: 1 if step < 1 else 0"])
    groups = data.get_samples(4)
    partials = [group for group in groups if group[0].metadata["data_source"] == "s1"]
    data.add_samples(partials)
    again = data.get_samples(6)
    assert plain(again[:2]) == plain(partials)
    assert counted(again[2:]) == {"s0": 4}


@pytest.mark.parametrize("tag", ["nobody", None])
def test_defect_unknown_sources_went_to_the_first_one(tmp_path: Path, tag: str | None) -> None:
    data = data_source(tmp_path, [1, 1])
    right, wrong = data.get_samples(2)
    for sample in wrong:
        sample.metadata["data_source"] = tag
    with pytest.raises(SourceUnknown, match="one of s0, s1"):
        data.add_samples([right, wrong])
    assert data.get_buffer_length() == 0, "nothing of a call that fails is taken"


def test_a_group_of_two_sources_is_refused(tmp_path: Path) -> None:
    data = data_source(tmp_path, [1, 1])
    (group,) = data.get_samples(1)
    group[1].metadata["data_source"] = "s1"
    with pytest.raises(SourceUnknown, match="'s0', 's1'"):
        data.add_samples([group])


def test_groups_of_another_size_are_refused(tmp_path: Path) -> None:
    data = data_source(tmp_path, [1])
    (group,) = data.get_samples(1)
    with pytest.raises(ValueError, match="lists of 2 samples each, not 1"):
        data.add_samples([group[:1]])
    with pytest.raises(ValueError, match="lists of 2 samples each, not Sample"):
        data.add_samples([group[0]])  # type: ignore[list-item]
    data.add_samples([])


def test_groups_from_elsewhere_get_indices_of_their_own(tmp_path: Path) -> None:
    data = data_source(tmp_path, [1])
    (group,) = data.get_samples(1)
    for sample in group:
        sample.group_index = sample.index = None
    data.add_samples([group])
    again, fresh = data.get_samples(2)
    assert [(s.group_index, s.index) for s in again + fresh] == [(1, 2), (1, 3), (2, 4), (2, 5)]


def test_generations_that_fan_out_come_back(tmp_path: Path) -> None:
    data = data_source(tmp_path, [1, 1])
    (group,) = data.get_samples(1)
    data.add_samples([[[group[0], group[0]], [group[1]]]])
    data.save(0)
    data.load(0)
    ((first, second),) = data.get_samples(1)
    assert [len(first), len(second)] == [2, 1]


def take_newest(args: Any, rollout_id: None, buffer: list[Any], count: int) -> list[Any]:
    taken = buffer[-count:]
    del buffer[-count:]
    return taken


def take_too_many(args: Any, rollout_id: None, buffer: list[Any], count: int) -> list[Any]:
    taken = list(buffer)
    buffer.clear()
    return taken


def take_and_fail_at_the_second_source(args: Any, rollout_id: None, buffer: list[Any], count: int) -> list[Any]:
    taken = take_too_many(args, rollout_id, buffer, count)
    if taken[0][0].metadata["data_source"] == "s1":
        raise RuntimeError("no")
    return taken


def test_a_buffer_filter_that_raises_costs_nothing(tmp_path: Path) -> None:
    """What it had taken of one source was gone when it failed at the next one."""
    path = f"{__name__}.take_and_fail_at_the_second_source"
    data = data_source(tmp_path, [1, 1], buffer_filter_path=path)
    data.add_samples(groups := data.get_samples(4))
    with pytest.raises(RuntimeError):
        data.get_samples(8)
    assert data.get_buffer_length() == 4
    data.save(0)
    data = data_source(tmp_path, [1, 1])
    data.load(0)
    assert plain(data.get_samples(4)) == plain(groups)


def test_a_buffer_filter_of_the_users(tmp_path: Path) -> None:
    data = data_source(tmp_path, [1], buffer_filter_path=f"{__name__}.take_newest")
    data.add_samples(data.get_samples(3))
    assert [group[0].group_index for group in data.get_samples(2)] == [1, 2]
    data = data_source(tmp_path, [1], buffer_filter_path=f"{__name__}.take_too_many")
    data.add_samples(data.get_samples(3))
    with pytest.raises(ValueError, match="returned 3 groups instead of 2"):
        data.get_samples(2)
    assert data.get_buffer_length() == 3


def test_metadata_of_the_users(tmp_path: Path) -> None:
    data = data_source(tmp_path, [1])
    data.update_metadata({"seen": 3})
    assert data.get_metadata() == {"seen": 3}


def test_less_than_no_groups_cannot_be_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not -1"):
        data_source(tmp_path, [1]).get_samples(-1)


def test_several_threads_share_a_data_source(tmp_path: Path) -> None:
    """slime's asynchronous rollout takes in one thread and gives back in another."""
    data = data_source(tmp_path, [1, 2])
    taken: list[Any] = []

    def work() -> None:
        for i in range(100):
            (group,) = data.get_samples(1)
            if i % 10 == 0:
                data.add_samples([group])
            else:
                taken.append(group)

    threads = [threading.Thread(target=work) for _ in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # so that threads meet in the middle of calls
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=30)
    finally:
        sys.setswitchinterval(interval)
    taken += data.get_samples(data.get_buffer_length())
    assert sorted(group[0].group_index for group in taken) == list(range(len(taken)))
    assert len({s.index for group in taken for s in group}) == 2 * len(taken)
