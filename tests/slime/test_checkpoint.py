"""Saving and loading the data source in slime's process: it goes on exactly where it was, or says why not."""

from __future__ import annotations

import copy
import json
import os
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.errors import ConfigError, CorruptState, ForeignState, StateError
from orchestrator.slime.custom_log import custom_rollout_log_function
from tests.support.slime_side import DataSource, make_args, plain, write_prompts

WEIGHTS = {"easy": "lambda step: 1 if step < 3 else 0", "hard": 0.3, "other": "lambda step: step / 5"}

operations = st.lists(
    st.tuples(st.sampled_from(["get", "get", "give back", "log"]), st.integers(0, 7)), min_size=1, max_size=12
)


def perform(data: DataSource, outstanding: list[Any], operation: str, number: int) -> Any:
    """One thing that slime does; what comes of it, as values."""
    if operation == "get":
        groups = data.get_samples(number)
        outstanding += groups
        return plain(groups)
    if operation == "give back":
        groups = [outstanding.pop(number % len(outstanding)) for _ in range(min(number, len(outstanding)))]
        for group in groups:
            group[0].tokens.append(number)
        data.add_samples(groups)
    elif number < 3:  # seldom, so that both ways of counting steps are met
        custom_rollout_log_function(number, data.args, [], {}, 0.0)
    return data.get_buffer_length(), data.rollout_step


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(operations=operations, cut=st.integers(0, 12), shuffle=st.booleans())
def test_cut_anywhere_the_rest_is_the_same(
    tmp_path: Path, operations: list[tuple[str, int]], cut: int, shuffle: bool
) -> None:
    def begin() -> DataSource:
        return DataSource(make_args(tmp_path, WEIGHTS, rollout_shuffle=shuffle))

    data, outstanding = begin(), []
    for operation in operations[:cut]:
        perform(data, outstanding, *operation)
    rollout_id = data.rollout_step - 1 if hasattr(data.args, "data_source_batches_formed") else cut
    data.save(rollout_id)
    others = copy.deepcopy(outstanding)
    rest = [perform(data, outstanding, *operation) for operation in operations[cut:]]

    again = begin()
    again.load(rollout_id)
    assert [perform(again, others, *operation) for operation in operations[cut:]] == rest
    assert plain(again.get_samples(9)) == plain(data.get_samples(9))


def test_what_is_saved_is_json_and_complete(tmp_path: Path) -> None:
    data = DataSource(make_args(tmp_path, WEIGHTS))
    groups = data.get_samples(5)
    groups[3][0].metadata["of_user"] = {"a": [1, None]}
    groups[3][0].rollout_log_probs = np.array([-0.5, -0.25], dtype=np.float32)
    groups[3][0].tokens = [np.int64(7)]
    data.add_samples([groups[3]])
    data.update_metadata({"seen": 3})
    data.save(2)
    (path,) = (tmp_path / "checkpoints" / "rollout").iterdir()
    assert path.name == "data_source_state_2.json"
    state = json.loads(path.read_text())
    assert [source["name"] for source in state["sources"]] == list(WEIGHTS)
    again = DataSource(make_args(tmp_path, WEIGHTS))
    again.load(2)
    sample = again.get_samples(1)[0][0]
    assert sample.rollout_log_probs == [-0.5, -0.25]
    assert sample.tokens == [7]
    assert sample.metadata["of_user"] == {"a": [1, None]}
    assert again.get_metadata() == {"seen": 3}


def test_defect_a_missing_checkpoint_restarted_at_step_0(tmp_path: Path) -> None:
    data = DataSource(make_args(tmp_path, WEIGHTS))
    with pytest.raises(StateError, match=r"no checkpoint of the data source for rollout 7 .* restart at step 0"):
        data.load(7)
    with pytest.raises(StateError, match="for rollout 0 in None"):
        DataSource(make_args(tmp_path, WEIGHTS, load=None)).load(0)


@pytest.mark.parametrize("rollout_id", [-1, None])
def test_a_run_that_begins_needs_no_checkpoint(tmp_path: Path, rollout_id: int | None) -> None:
    for load in (str(tmp_path / "nowhere"), None):
        data = DataSource(make_args(tmp_path, WEIGHTS, load=load))
        data.load(rollout_id)
        assert data.rollout_step == 0


def test_without_an_id_the_newest_is_loaded(tmp_path: Path) -> None:
    data = DataSource(make_args(tmp_path, WEIGHTS))
    for rollout_id in (2, 10):
        data.get_samples(4)
        data.save(rollout_id)
    again = DataSource(make_args(tmp_path, WEIGHTS))
    again.load()
    assert again.rollout_step == 2
    again.load(2)
    assert again.rollout_step == 1


def test_defect_files_of_the_same_stem_shared_a_checkpoint(tmp_path: Path) -> None:
    files = [write_prompts(tmp_path / folder / "train.jsonl", 5, name=folder) for folder in ("easy", "hard")]
    with pytest.raises(ConfigError, match="'train' occurs twice"):
        DataSource(make_args(tmp_path, {"a": 3, "b": 1}, prompt_data=files, prompt_data_source_names=None))

    def begin() -> DataSource:
        return DataSource(make_args(tmp_path, {"a": 3, "b": 1}, prompt_data=files))

    data = begin()
    data.get_samples(6)
    data.save(1)
    again = begin()
    again.load(1)
    assert plain(again.get_samples(6)) == plain(data.get_samples(6))


@pytest.mark.parametrize("weights", [{"easy": 1, "hard": 1}, {"hard": 1, "easy": 1, "other": 1}, {"easy": 1, "b": 1}])
def test_a_checkpoint_of_other_sources_is_refused_with_both_lists(tmp_path: Path, weights: dict[str, int]) -> None:
    DataSource(make_args(tmp_path, WEIGHTS)).save(1)
    data = DataSource(make_args(tmp_path, weights))
    with pytest.raises(ForeignState) as caught:
        data.load(1)
    assert "it has easy (7 prompts), hard (7 prompts), other (7 prompts)" in str(caught.value)
    assert "the options have " + ", ".join(f"{name} (7 prompts)" for name in weights) in str(caught.value)


def test_a_checkpoint_of_another_order_is_refused(tmp_path: Path) -> None:
    DataSource(make_args(tmp_path, WEIGHTS)).save(1)
    for change in ({"rows": 8}, {"rollout_seed": 1}, {"rollout_shuffle": True}):
        with pytest.raises(ForeignState, match="the options "):
            DataSource(make_args(tmp_path, WEIGHTS, **change)).load(1)


def test_another_batch_size_keeps_the_step(tmp_path: Path) -> None:
    data = DataSource(make_args(tmp_path, WEIGHTS, rollout_batch_size=8))
    data.get_samples(15)
    data.save(1)
    again = DataSource(make_args(tmp_path, WEIGHTS, rollout_batch_size=4))
    again.load(1)
    assert again.rollout_step == 2
    again.get_samples(1)
    assert again.rollout_step == 3


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"format": 2}', '{"format": 1}', "\x00"])
def test_a_damaged_checkpoint_is_named_and_changes_nothing(tmp_path: Path, damage: str) -> None:
    data = DataSource(make_args(tmp_path, WEIGHTS))
    data.save(1)
    expected = plain(data.get_samples(3))
    (tmp_path / "checkpoints" / "rollout" / "data_source_state_1.json").write_text(damage)
    again = DataSource(make_args(tmp_path, WEIGHTS))
    with pytest.raises(CorruptState, match="checkpoint"):
        again.load(1)
    assert plain(again.get_samples(3)) == expected


def test_every_key_of_a_checkpoint_is_needed(tmp_path: Path) -> None:
    """A checkpoint with something left out is refused whole: no state is half restored."""
    data = DataSource(make_args(tmp_path, WEIGHTS))
    data.get_samples(9)
    data.save(1)
    path = tmp_path / "checkpoints" / "rollout" / "data_source_state_1.json"
    whole = json.loads(path.read_text())
    fresh = plain(DataSource(make_args(tmp_path, WEIGHTS)).get_samples(5))
    for place in (whole, whole["sources"][2]):
        for key in list(place):
            value = place.pop(key)
            path.write_text(json.dumps(whole))
            again = DataSource(make_args(tmp_path, WEIGHTS))
            with pytest.raises(CorruptState):
                again.load(1)
            assert plain(again.get_samples(5)) == fresh, key
            place[key] = value


def test_a_checkpoint_is_whole_or_not_there(tmp_path: Path) -> None:
    """What cannot be written leaves the older checkpoint, and no litter."""
    data = DataSource(make_args(tmp_path, WEIGHTS))
    (group,) = data.get_samples(1)
    data.save(1)
    group[0].metadata["socket"] = object()
    data.add_samples([group])
    with pytest.raises(StateError, match="a object cannot be written as JSON"):
        data.save(1)
    assert os.listdir(tmp_path / "checkpoints" / "rollout") == ["data_source_state_1.json"]
    again = DataSource(make_args(tmp_path, WEIGHTS))
    again.load(1)
    assert again.get_buffer_length() == 0


def test_a_disk_that_fails_costs_nothing(tmp_path: Path) -> None:
    data = DataSource(make_args(tmp_path, WEIGHTS))
    data.save(1)
    data.add_samples(data.get_samples(50))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(StateError, match=r"cannot write .*: File too large"):
            data.save(1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path / "checkpoints" / "rollout") == ["data_source_state_1.json"]
    again = DataSource(make_args(tmp_path, WEIGHTS))
    again.load(1)
    assert again.get_buffer_length() == 0
    data.save(1)
    again.load(1)
    assert again.get_buffer_length() == 50


def test_the_step_of_a_rollout_that_slime_does_again(tmp_path: Path) -> None:
    """One rollout ahead, slime saves rollout 3 when it has logged rollout 4; after loading 3 it does 4 again."""
    data = DataSource(make_args(tmp_path, WEIGHTS))
    custom_rollout_log_function(4, data.args, [], {}, 0.0)
    data.save(3)
    again = DataSource(make_args(tmp_path, WEIGHTS))
    again.load(3)
    assert again.rollout_step == 4


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="set --save to a directory"):
        DataSource(make_args(tmp_path, WEIGHTS, save=None)).save(1)
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="cannot write"):
        DataSource(make_args(tmp_path, WEIGHTS, save=str(tmp_path / "file"))).save(1)
