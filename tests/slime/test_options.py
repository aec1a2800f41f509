"""slime's options as the data source reads them, and the prompt files they name."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import ConfigError, PromptFileError
from tests.support.paths import ROOT
from tests.support.slime_side import DataSource, make_args, write_prompts, write_stand_in


@pytest.fixture
def slime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    write_stand_in(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "slime"]:
        del sys.modules[name]


def prompts(directory: Path, rows: list[Any], **options: Any) -> list[Any]:
    path = directory / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n\n" for row in rows))
    defaults = {"prompt_data": str(path), "prompt_data_source_names": "only", "label_key": None}
    data = DataSource(make_args(directory, {"only": 1}, **(defaults | options)))
    return [group[0] for group in data.get_samples(len(data))]


# -- options ----------------------------------------------------------------------------------------------------------


def test_the_defaults_are_those_of_slime(tmp_path: Path) -> None:
    path = write_prompts(tmp_path / "easy.jsonl", 3)
    data = DataSource(Namespace(prompt_data=path, rollout_batch_size=2))
    ((sample,), *_) = data.get_samples(4)
    assert (sample.prompt, sample.label, sample.group_index, sample.index) == ("easy 0", None, 0, 0)
    assert sample.metadata == {
        "row": 0, "data_source": "easy", "data_source_weight": 1.0, "data_source_rollout_step": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"data_source_weights": [1]}, r"data_source_weights: 1 weights for 2 sources"),
        ({"data_source_weights": None}, r"data_source_weights: 0 weights for 2 sources"),
        ({"data_source_weights": [1, -1]}, r"data_source_weights\[1\]: the weight is -1"),
        ({"data_source_weights": [1, "lambda step: open('x')"]}, r"data_source_weights\[1\]: "),
        ({"data_source_weights": [1, "no.such.function"]}, r"data_source_weights\[1\]: no.such.function"),
        ({"data_source_weights": [0, 0]}, r"data_source_weights: all are 0 at step 0"),
        ({"data_source_reward_caps": [1]}, r"data_source_reward_caps: 1 reward caps for 2 sources"),
        ({"data_source_reward_caps": [None, "lambda x"]}, r"data_source_reward_caps: "),
        ({"prompt_data_source_names": ["a"]}, r"prompt_data_source_names: 1 names for 2 files"),
        ({"prompt_data_source_names": ["a", "a"]}, r"prompt_data_source_names: 'a' occurs twice"),
        ({"prompt_data_source_names": ["a", "b/c"]}, r"'b/c' cannot be part of a metric's name"),
        ({"prompt_data": None, "prompt_data_source_names": None}, r"prompt_data: is missing"),
        ({"rollout_batch_size": None}, r"rollout_batch_size: is None \(give a whole number of at least 1\)"),
        ({"rollout_batch_size": 0}, r"rollout_batch_size: is 0"),
        ({"n_samples_per_prompt": "8"}, r"n_samples_per_prompt: is '8'"),
        ({"rollout_seed": -1}, r"rollout_seed: is -1"),
        ({"rollout_global_dataset": False}, r"rollout_global_dataset: is off"),
        ({"multimodal_keys": {"image": "i"}}, r"multimodal_keys: is not supported"),
        ({"buffer_filter_path": "no.such.filter"}, r"buffer_filter_path: no.such.filter"),
        ({"buffer_sort_by_staleness": True}, r"buffer_sort_by_staleness: is not supported"),
        ({"apply_chat_template_kwargs": "x"}, r"apply_chat_template_kwargs: is 'x'"),
    ],
)
def test_wrong_configuration_is_a_value_error(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    args = make_args(tmp_path, {"a": 1, "b": 1}, **options)
    with pytest.raises(ValueError, match=says):
        DataSource(args)


def test_all_problems_are_named_at_once(tmp_path: Path) -> None:
    args = make_args(tmp_path, {"a": "x.y.z", "b": -1}, rollout_batch_size=0, data_source_reward_caps=[1])
    with pytest.raises(ConfigError) as caught:
        DataSource(args)
    keys = [problem.key for problem in caught.value.problems]
    assert keys == [
        "data_source_weights[0]", "data_source_weights[1]", "data_source_reward_caps", "rollout_batch_size",
    ]  # fmt: skip


def test_defect_weights_were_run_by_eval(tmp_path: Path) -> None:
    evil = f"lambda step: __import__('pathlib').Path({str(tmp_path / 'written')!r}).touch() or 1"
    with pytest.raises(ConfigError):
        DataSource(make_args(tmp_path, {"a": evil}))
    assert not (tmp_path / "written").exists()


# -- prompts ----------------------------------------------------------------------------------------------------------


def test_keys_and_values(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "two?"}]
    first, second, third = prompts(
        tmp_path,
        [
            {"q": "one?", "a": 1, "m": {"k": 1}},
            {"q": messages, "a": [2], "m": '{"k": 2}', "tools": [{"name": "calc"}]},
            {"q": "three?", "a": None, "m": None, "tools": ""},
        ],
        input_key="q", label_key="a", metadata_key="m",
    )  # fmt: skip
    assert (first.prompt, first.label, first.metadata["k"]) == ("one?", 1, 1)
    assert (second.prompt, second.label, second.metadata["k"]) == (messages, [2], 2)
    assert second.metadata["tools"] == [{"name": "calc"}]
    assert third.label is None
    assert "tools" not in third.metadata


def test_bad_rows_are_named_all_at_once(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(
        '{"input": "right"}\n{"input": \n[1]\n{"prompt": "x"}\n{"input": 5}\n{"input": "x", "metadata": 3}\n'
    )
    with pytest.raises(PromptFileError) as caught:
        prompts(tmp_path, [], prompt_data=str(path))
    said = str(caught.value).splitlines()
    assert [line.removeprefix(f"{path}:").split(":")[0] for line in said] == ["2", "3", "4", "5", "6"]
    assert "no key 'input'; the row has 'prompt'" in said[2]
    assert "'metadata' is of type int; expected dict" in said[4]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.jsonl", b"", "it has no prompts"),
        ("latin.jsonl", b'{"input": "\xe9"}\n', "not UTF-8"),
        ("rows.csv", b"input\nx\n", "use .jsonl or .parquet"),
        ("rows.parquet", b"not parquet", "not a Parquet file"),
    ],
)
def test_files_that_are_none(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PromptFileError, match=says):
        prompts(tmp_path, [], prompt_data=str(tmp_path / name))


def test_a_file_that_is_not_there_is_a_value_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read .*no\.jsonl: No such file"):
        prompts(tmp_path, [], prompt_data=str(tmp_path / "no.jsonl"))


@pytest.mark.parametrize(
    ("part", "rows"), [("[2:4]", [2, 3]), ("[:2]", [0, 1]), ("[5:]", [5, 6]), ("[-2:]", [5, 6]), ("[:-5]", [0, 1])]
)
def test_a_slice_of_the_rows(tmp_path: Path, part: str, rows: list[int]) -> None:
    path = write_prompts(tmp_path / "easy.jsonl", 7)
    args = Namespace(prompt_data=[f"{path}@{part}"], rollout_batch_size=1)
    data = DataSource(args)
    assert [group[0].metadata["row"] for group in data.get_samples(len(data))] == rows
    assert data.get_samples(1)[0][0].metadata["data_source"] == "easy"


def test_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    rows = [{"input": f"q{i}", "answer": str(i), "metadata": {"row": i}} for i in range(5)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "five.parquet")
    samples = prompts(tmp_path, [], prompt_data=str(tmp_path / "five.parquet"), label_key="answer")
    assert [(s.prompt, s.label, s.metadata["row"]) for s in samples] == [(f"q{i}", str(i), i) for i in range(5)]


def test_templates_need_slime(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="slime is not installed"):
        prompts(tmp_path, [{"input": "x"}], apply_chat_template=True)


@pytest.mark.usefixtures("slime")
def test_templates_are_those_of_slimes_tokenizer(tmp_path: Path) -> None:
    rows = [
        {"input": "one?", "tools": [{"name": "calc"}]},
        {"input": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "two?"}]},
    ]
    options = {"apply_chat_template": True, "apply_chat_template_kwargs": {"think": False}, "hf_checkpoint": "a-model"}
    first, second = prompts(tmp_path, rows, **options)
    assert first.prompt == "<user>one?<assistant>['calc']{'think': False}"
    assert second.prompt == "<system>be brief<user>two?<assistant>[]{'think': False}"


@pytest.mark.usefixtures("slime")
def test_long_prompts_are_left_out(tmp_path: Path) -> None:
    rows = [{"input": "a b c"}, {"input": "a b c d"}, {"input": "a"}]
    samples = prompts(tmp_path, rows, rollout_max_prompt_len=3, hf_checkpoint="a-model")
    assert [sample.prompt for sample in samples] == ["a b c", "a"]


SLIMES_LOADER = """
import json
from types import SimpleNamespace
from slime.utils.types import Sample

class RolloutDataSourceWithBuffer:
    def __init__(self, args):
        assert args.rollout_global_dataset and not args.rollout_shuffle and args.buffer_filter_path is None
        rows = [json.loads(line) for line in open(args.prompt_data)]
        samples = [Sample(prompt=row["input"].upper(), label=row["answer"], metadata=row["metadata"]) for row in rows]
        for sample in samples:
            sample.multimodal_inputs = {"images": [sample.label]}
        self.dataset = SimpleNamespace(samples=samples)
"""


def test_files_are_read_by_slimes_own_data_source_where_slime_is(tmp_path: Path) -> None:
    """In a process of its own: whatever slime's loader makes of a row is handed out, n times, with our tags."""
    write_stand_in(tmp_path)
    (tmp_path / "slime/rollout/data_source.py").write_text(SLIMES_LOADER)
    program = """
import sys
from tests.support.slime_side import DataSource, make_args
from pathlib import Path
args = make_args(Path(sys.argv[1]), {"a": 1, "b": 1}, rollout_shuffle=True, buffer_filter_path=None)
data = DataSource(args)
groups = data.get_samples(28)
assert args.rollout_shuffle and isinstance(args.prompt_data, list), "slime's own options stay as they are"
for group in groups:
    one, two = group
    assert one.of_slime and one.prompt in {f"{name} {i}" for name in "AB" for i in range(7)}
    assert one.multimodal_inputs == {"images": [one.label]} and one.multimodal_inputs is not two.multimodal_inputs
    assert one.metadata["data_source"] == one.prompt[0].lower() and "row" in one.metadata
assert sorted({g[0].prompt for g in groups[:14]}) == sorted({g[0].prompt for g in groups[14:]})
assert [s.index for g in groups for s in g] == list(range(56))
print("ok")
"""
    run = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        timeout=30,
        check=False,
    )
    assert run.stdout.decode().strip() == "ok", run.stderr.decode()


@pytest.mark.usefixtures("slime")
def test_samples_are_slimes_own_where_slime_is(tmp_path: Path) -> None:
    args = make_args(tmp_path, {"a": 1, "b": 1})
    data = DataSource(args)
    groups = data.get_samples(3)
    assert all(sample.of_slime for group in groups for sample in group)
    groups[1][0].status = type(groups[1][0].status).ABORTED
    data.add_samples(groups[1:])
    data.save(0)
    again = DataSource(args)
    again.load(0)
    assert again.get_samples(2) == groups[1:]
