"""Rollouts for slime from a running daemon: every field, no batch twice, acknowledged when trained on, checkpoints."""

from __future__ import annotations

import importlib
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import BadRequest, BatchTimeout, CheckpointError, RunFinished
from orchestrator.slime.custom_log import rollout_metrics
from orchestrator.slime.samples import Sample
from orchestrator.slime_rollout import DaemonDataSource, generate_rollout
from tests.support.daemon_process import DaemonProcess, daemon, write_config
from tests.support.paths import ROOT
from tests.support.slime_side import write_stand_in

EXTRA = {
    "slime/rollout/base_types.py": """
from dataclasses import dataclass

@dataclass
class RolloutFnTrainOutput:
    samples: list
    metrics: dict = None
""",
    "slime/rollout/sglang_rollout.py": "def generate_rollout(args, rollout_id, data_source, evaluation=False):\n"
    "    return 'evaluated', rollout_id, evaluation\n",
}


@pytest.fixture
def slime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    write_stand_in(tmp_path)
    for name, text in EXTRA.items():
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "slime"]:
        del sys.modules[name]


def args_of(process: DaemonProcess, **options: Any) -> Namespace:
    sizes = {"rollout_batch_size": 4, "n_samples_per_prompt": 2}
    return Namespace(orchestrator_socket=str(process.socket), **(sizes | options))


def test_every_field_is_filled(tmp_path: Path) -> None:
    config = write_config(tmp_path, sampling={"max_new_tokens": 8})
    with daemon(config) as process:
        args, source = args_of(process), DaemonDataSource(None)
        source.args = args
        output = generate_rollout(args, 0, source)
        assert [len(group) for group in output.samples] == [2] * 4
        for group in output.samples:
            for sample in group:
                assert isinstance(sample, Sample)
                empty = {item.name for item in fields(sample) if getattr(sample, item.name) in (None, [], "")}
                assert empty == {"train_metadata"}
                name = sample.metadata["data_source"]
                assert sample.prompt.startswith(name)
                assert bytes(sample.tokens[: -sample.response_length]).decode() == sample.prompt
                assert len(sample.loss_mask) == len(sample.rollout_log_probs) == sample.response_length == 8
                assert sample.response == bytes(sample.tokens[-8:]).decode()
                assert sample.status == Sample.Status.TRUNCATED
                assert sample.reward in (0.0, 1.0)
                assert sample.weight_versions == ["0"]
                assert sample.metadata["data_source_weight"] == pytest.approx({"easy": 0.7, "hard": 0.3}[name])
                assert sample.metadata["data_source_rollout_step"] == 0
            assert len({sample.group_index for sample in group}) == 1
        assert len({sample.rollout_id for group in output.samples for sample in group}) == 8
        assert output.metrics["rollout/orchestrator/step"] == 0
        metrics = rollout_metrics(output.samples, {"easy": 0.7, "hard": 0.3})
        assert metrics["rollout/easy/sample_count"] + metrics["rollout/hard/sample_count"] == 8


@pytest.mark.usefixtures("slime")
def test_with_slime_they_are_of_slimes_types_and_evaluation_is_slimes(tmp_path: Path) -> None:
    with daemon(write_config(tmp_path)) as process:
        args, source = args_of(process), Namespace()
        output = generate_rollout(args, 0, source)
        assert type(output) is importlib.import_module("slime.rollout.base_types").RolloutFnTrainOutput
        sample = output.samples[0][0]
        assert sample.of_slime
        assert sample.status.value == "truncated"
        assert sample.rollout_log_probs is not None, "also where that version of slime has no such field"
        assert generate_rollout(args, 3, source, evaluation=True) == ("evaluated", 3, True)


def test_batches_are_acknowledged_once_they_are_trained_on_for_certain(tmp_path: Path) -> None:
    with daemon(write_config(tmp_path)) as process:
        args, source = args_of(process), Namespace()
        seen = []
        for rollout in range(4):
            output = generate_rollout(args, rollout, source)
            assert output.metrics["rollout/orchestrator/step"] == rollout
            seen += [group[0].group_index for group in output.samples]
            with process.connect() as client:
                status = client.status()
            assert [lease["step"] for lease in status["leases"]] == list(range(max(0, rollout - 1), rollout + 1))
            assert status["policy_version"] == rollout
        process.kill()
        process.start()
        process.connect().close()
        output = generate_rollout(args, 4, source)
        assert output.metrics["rollout/orchestrator/step"] == 4, "those in hand came again, and were recognised"
        seen += [group[0].group_index for group in output.samples]
        assert len(set(seen)) == len(seen) == 20


def test_the_daemon_goes_back_with_slime(tmp_path: Path) -> None:
    with daemon(write_config(tmp_path)) as process:
        args = args_of(process)
        source = DaemonDataSource(args)
        source.load(-1)
        for rollout in range(2):
            generate_rollout(args, rollout, source)
        source.save(1)
        first = [group[0].group_index for group in generate_rollout(args, 2, source).samples]
        generate_rollout(args, 3, source)
        del source  # its process ended
        again = DaemonDataSource(args)  # slime was started again, from its checkpoint 1
        again.load(1)
        output = generate_rollout(args, 2, again)
        assert output.metrics["rollout/orchestrator/step"] == 2
        assert [group[0].metadata["data_source_rollout_step"] for group in output.samples] == [2] * 4
        assert len(first) == 4
        with pytest.raises(CheckpointError):
            again.load(7)
        assert len(again) == len(again.dataset) == 200


def test_what_cannot_be_is_said(tmp_path: Path) -> None:
    config = write_config(tmp_path, rollout={"num_rollout": 1})
    with daemon(config) as process:
        source = DaemonDataSource(args_of(process))
        with pytest.raises(ValueError, match="rollout_batch_size 4, but slime's option is 8"):
            generate_rollout(args_of(process, rollout_batch_size=8), 0, Namespace())
        with pytest.raises(BadRequest, match="eval-function-path"):
            generate_rollout(args_of(process), 0, source, evaluation=True)
        with pytest.raises(BadRequest, match="rollout-function-path"):
            source.get_samples(1)
        with pytest.raises(BadRequest, match="do not return samples"):
            source.add_samples([[Sample()]])
        source.add_samples([])


def test_the_end_of_the_run_and_a_wait_have_their_reason(tmp_path: Path) -> None:
    with daemon(write_config(tmp_path, rollout={"num_rollout": 1})) as process:
        args, source = args_of(process, orchestrator_timeout_s=0.2), Namespace()
        generate_rollout(args_of(process), 0, source)
        with pytest.raises(RunFinished):
            generate_rollout(args, 1, source)
    with daemon(write_config(tmp_path, run={"state_dir": "other"})) as process:
        with process.connect() as client:
            client.pause("easy")
            client.pause("hard")
        with pytest.raises(BatchTimeout, match="paused: easy, hard"):
            generate_rollout(args, 0, Namespace())


def test_importing_it_loads_nothing_large() -> None:
    large = {"torch", "slime", "anyio", "numpy"}
    program = f"import sys, orchestrator.slime_rollout; print(*sorted({large!r} & set(sys.modules)))"
    root = ROOT
    run = subprocess.run([sys.executable, "-c", program], cwd=root, timeout=30, check=True, capture_output=True)
    assert run.stdout.decode().strip() == ""
