"""`orchestrator check`: what it reports of a config that can be used, and what it looks at."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.cli import main
from orchestrator.cli.exit_codes import BAD_CONFIG, OK, USAGE
from tests.support.paths import ROOT


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory to work in, with prompts and an importable module of the user's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ten.jsonl").write_text("".join(f'{{"prompt": "{i}", "label": "{i}"}}\n' for i in range(10)))
    return tmp_path


def config(run: Path, weights: str, more: str = "") -> str:
    path = run / "run.yaml"
    path.write_text(
        f"""
engines: [{{kind: scripted}}]
rollout: {{rollout_batch_size: 10, num_rollout: 40}}
data_sources:
  - {{name: a, prompts: {{path: ten.jsonl}}}}
  - {{name: b, prompts: {{path: ten.jsonl}}}}
data_source_weights: {weights}
{more}"""
    )
    return str(path)


def test_the_report(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["check", "config/curriculum.yaml"]) == OK
    shown = capsys.readouterr()
    lines = [line.split() for line in shown.out.splitlines()]
    assert ["easy", "300", "0.900", "0.100", "contains"] in [[w for w in line if w != "│"] for line in lines]
    assert ["engine", "embedded-0", "(embedded)"] in lines
    assert lines[-1] == ["OK"]
    assert shown.err == ""


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        (
            '[1, "lambda step: 1 - step / 20"]',
            ":7: data_source_weights[1]: lambda step: 1 - step / 20 at step 21 gives -0.05",
        ),
        ('[1, "lambda step: 1 / (step - 39)"]', ":7: data_source_weights[1]: lambda step: 1 / (step - 39) at step 0"),
        ('["lambda step: step < 30", 0]', ":7: data_source_weights: all weights are 0 at step 30: that batch could"),
        ("[1, a_module.away]", ":7: data_source_weights[1]: a_module.away: "),
        ("[1, away.schedule]", ":7: data_source_weights[1]: away.schedule"),
    ],
)
def test_weights_of_the_coming_steps(run: Path, capsys: pytest.CaptureFixture[str], weights: str, says: str) -> None:
    (run / "a_module.py").write_text("def here(step): return 1.0\n")
    path = config(run, weights)
    assert main(["check", path]) == BAD_CONFIG
    assert path + says in capsys.readouterr().err


def test_steps_beyond_the_run_are_not_looked_at(run: Path) -> None:
    assert main(["check", config(run, '[1, "lambda step: 39 - step"]')]) == OK


def test_everything_that_is_named_is_looked_at_and_all_of_it_is_reported(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config(
        run,
        "[nowhere.weight, 1]",
        """
data_source_reward_caps: [null, "lambda step: 1 - step"]
dynamic_sampling_filter: nowhere.filter
""",
    )
    text = (
        Path(path)
        .read_text()
        .replace("{name: b, prompts: {path: ten.jsonl}", "{name: b, reward: nowhere.reward, prompts: {path: no.jsonl}")
    )
    Path(path).write_text(text)
    assert main(["check", path]) == BAD_CONFIG
    keys = [
        line.removeprefix(path).split(": ")[:2]
        for line in capsys.readouterr().err.splitlines()
        if line.startswith(path)
    ]
    assert keys == [
        [":6", "data_sources[1].prompts.path"],
        [":6", "data_sources[1].reward"],
        [":7", "data_source_weights[0]"],
        [":9", "data_source_reward_caps[1]"],
        [":10", "dynamic_sampling_filter"],
    ]


def test_what_may_be_meant_is_a_warning(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = config(run, "[1, 1]")
    text = Path(path).read_text()
    text = text.replace("{name: a, prompts: {path: ten.jsonl}", "{name: a, prompts: {path: ten.jsonl, epochs: 19}")
    text = text.replace(
        "{name: b, prompts: {path: ten.jsonl}", "{name: b, prompts: {path: ten.jsonl}, buffer: {bytes: 100000}"
    )
    Path(path).write_text(text)
    assert main(["check", path]) == OK
    shown = capsys.readouterr().out
    assert "warning: a: 10 prompts for 19 epochs, but the next 40 batches need 200 groups of it" in shown
    assert "warning: b: 5 groups of the longest responses take 368,640 bytes, but buffer.bytes is 100,000" in shown


def test_what_fits_exactly_is_right(run: Path) -> None:
    path = config(
        run,
        "[1, 1]",
        """
engine_defaults: {stall_s: 60, request_timeout_s: 60}
""",
    )
    text = Path(path).read_text().replace("num_rollout: 40}", "num_rollout: 40, over_sampling_batch_size: 10}")
    text = text.replace("{name: a, prompts: {path: ten.jsonl}", "{name: a, prompts: {path: ten.jsonl, epochs: 20}")
    text = text.replace("{name: b, ", "{name: b, buffer: {groups: 5, bytes: 368640}, ")
    Path(path).write_text(text)
    assert main(["check", path]) == OK


def test_nothing_is_written(run: Path) -> None:
    before = sorted(run.rglob("*"))
    path = config(run, "[1, 1]")
    assert main(["check", path]) == OK
    assert sorted(run.rglob("*")) == sorted([*before, Path(path)])


def test_usage() -> None:
    assert main(["check"]) == USAGE
