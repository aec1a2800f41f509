"""The configuration format of the curriculum example: each block of its page, and the examples that are shipped."""

from __future__ import annotations

import importlib
import json
import math
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from ruamel.yaml import YAML

from examples.curriculum_learning import weight_scheduler as example
from orchestrator import weight_scheduler
from orchestrator.cli import main
from orchestrator.config.schema import config_schema
from tests.support.paths import ROOT
from tests.support.slime_side import DataSource, counted, make_args, write_prompts

EXAMPLES = sorted((ROOT / "examples" / "curriculum_learning").glob("*.yaml"))

Share = Callable[[int], float]


def down(step: int) -> float:
    return 0.9 - 0.8 * min(step / 200, 1.0)


def up(step: int) -> float:
    return 0.1 + 0.8 * min(step / 200, 1.0)


CONSTANT = """
data_source_weights:
  - 0.5  # constant
  - 0.5  # constant
"""
LAMBDA = """
data_source_weights:
  - "lambda step: 0.9 - 0.8 * min(step / 200, 1.0)"  # decreasing
  - "lambda step: 0.1 + 0.8 * min(step / 200, 1.0)"  # increasing
"""
FUNCTION = """
data_source_weights:
  - "examples.curriculum_learning.weight_scheduler.easy_to_hard"
  - "examples.curriculum_learning.weight_scheduler.hard_to_easy"
"""
MIXED = """
data_source_weights:
  - 0.3  # constant for source 1
  - "lambda step: 0.5 + step/2000"  # lambda for source 2
  - "examples.curriculum_learning.weight_scheduler.hard_to_easy"  # function for source 3
"""
OWN = """
data_source_weights:
  - "path.to.your.module.my_custom_schedule"
  - 0.5  # other source with constant weight
"""

BLOCKS: dict[str, tuple[str, list[Share]]] = {
    "constant": (CONSTANT, [lambda _: 0.5, lambda _: 0.5]),
    "lambda": (LAMBDA, [down, up]),
    "function": (FUNCTION, [down, up]),
    "mixed": (MIXED, [lambda _: 0.3, lambda step: 0.5 + step / 2000, up]),
    "own": (OWN, [lambda step: 0.9 if step < 100 else 0.5 if step < 500 else 0.1, lambda _: 0.5]),
}


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_has_the_weights_it_promises(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, promised = BLOCKS[block]
    if block == "own":
        module = tmp_path / "path" / "to" / "your" / "module.py"
        module.parent.mkdir(parents=True)
        module.write_text("from examples.curriculum_learning.weight_scheduler import my_custom_schedule\n")
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(tmp_path)
    else:
        monkeypatch.chdir(ROOT)
    weights = YAML(typ="safe", pure=True).load(text)["data_source_weights"]
    data = DataSource(make_args(tmp_path, {f"s{i}": weight for i, weight in enumerate(weights)}))
    for step in (0, 1, 99, 100, 199, 200, 499, 500, 1000):
        data.args.data_source_batches_formed = step
        total = math.fsum(share(step) for share in promised)
        for sample, _ in data.get_samples(8):
            tags = sample.metadata
            share = promised[int(tags["data_source"][1:])](step) / total
            assert tags["data_source_rollout_step"] == step
            assert tags["data_source_weight"] == pytest.approx(share, rel=1e-12)


@pytest.mark.parametrize("block", BLOCKS)
def test_the_daemon_reads_the_same_weights(
    block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text, promised = BLOCKS[block]
    text = text.replace("path.to.your.module", "examples.curriculum_learning.weight_scheduler")
    names = [f"s{i}" for i in range(len(promised))]
    files = [write_prompts(tmp_path / f"{name}.jsonl", 3) for name in names]
    config = f"prompt_data: {files}\nprompt_data_source_names: {names}\nlabel_key: answer\ninput_key: input\n"
    (tmp_path / "run.yaml").write_text(config + "engines: [{kind: scripted}]\n" + text)
    monkeypatch.chdir(ROOT)
    assert main(["weights", str(tmp_path / "run.yaml"), "--steps", "601", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 601
    for row in rows:
        total = math.fsum(share(row["step"]) for share in promised)
        shares = {name: share(row["step"]) / total for name, share in zip(names, promised, strict=True)}
        assert row["weights"] == pytest.approx(shares, rel=1e-12)


def test_a_curriculum_goes_from_easy_to_hard(tmp_path: Path) -> None:
    """Over 200 batches of 4 groups: of the first 40 groups 35.3 are owed to easy, of the last 40 4.9, of all 401.6."""
    data = DataSource(make_args(tmp_path, {"easy": LAMBDA.split('"')[1], "hard": LAMBDA.split('"')[3]}))
    groups = data.get_samples(800)
    assert [counted(groups[begin : begin + 40])["easy"] for begin in (0, 760)] == [35, 5]
    assert counted(groups)["easy"] == pytest.approx(401.6, abs=0.5)


# -- the schedules ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", weight_scheduler.__all__)
def test_a_schedule_is_found_under_the_path_of_the_page(name: str) -> None:
    module = importlib.import_module("examples.curriculum_learning.weight_scheduler")
    assert getattr(module, name) is getattr(weight_scheduler, name)
    assert name in module.__all__


@pytest.mark.parametrize(("step", "weight"), [(0, 0.9), (99, 0.9), (100, 0.5), (499, 0.5), (500, 0.1), (9999, 0.1)])
def test_the_schedule_of_your_own(step: int, weight: float) -> None:
    assert example.my_custom_schedule(step) == weight


# -- the examples -----------------------------------------------------------------------------------------------------


def test_there_is_an_example_of_every_form() -> None:
    assert [path.stem for path in EXAMPLES] == ["constant", "function", "lambda", "mixed"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_right_for_the_daemon(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    jsonschema.validate(YAML(typ="safe", pure=True).load(path.read_text()), config_schema())
    assert main(["check", str(path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "OK"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_right_for_slime(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """slime lays the keys of its custom config over its options; relative paths are of the working directory."""
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.chdir(path.parent)
    options: dict[str, Any] = YAML(typ="safe", pure=True).load(path.read_text())
    data = DataSource(Namespace(**options))
    groups = data.get_samples(16)
    assert counted(groups).keys() == set(options["prompt_data_source_names"])
    assert all(group[0].label.isdigit() for group in groups)


def test_prompts_of_the_examples_are_those_of_the_configs(tmp_path: Path) -> None:
    """A file of the daemon's defaults needs its input key named: slime's own default is another."""
    path = write_prompts(tmp_path / "x.jsonl", 1)
    with pytest.raises(ValueError, match="no key 'prompt'; the row has 'input', 'answer', 'metadata'"):
        DataSource(Namespace(prompt_data=path, rollout_batch_size=1, input_key="prompt"))
