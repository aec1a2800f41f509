"""A running daemon takes a changed config over, wholly or not at all, and a crash does not forget it."""

from __future__ import annotations

import signal
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli.live import described
from orchestrator.client import RolloutClient
from orchestrator.config import differences, load_config, with_fixed
from orchestrator.errors import ConfigRefused
from tests.core.ledger.test_source_changes import assert_accounted, source
from tests.support.daemon_process import DaemonProcess, daemon, write_config, write_prompts

SCRIPTED = {"kind": "scripted", "time_scale": 0.0}


def counts(client: RolloutClient, batches: int) -> Counter[str]:
    """Groups by source over some batches, acknowledged."""
    found: Counter[str] = Counter()
    for _ in range(batches):
        batch = client.get_batch(timeout_s=30)
        found.update(group.source for group in batch.groups)
        client.ack(batch.lease)
    return found


def test_what_can_change_live_does(tmp_path: Path) -> None:
    write_prompts(tmp_path / "code.jsonl", 50)
    config = write_config(tmp_path)
    with daemon(config) as process, process.connect() as client:
        counts(client, 3)
        write_config(
            tmp_path,
            rollout={"rollout_batch_size": 8, "n_samples_per_prompt": 2, "chunk_tokens": 64},
            data_sources=[source("easy", buffer={"groups": 6}), source("code")],
            data_source_weights=["lambda step: 1", 1],
            data_source_reward_caps=[None, 5.0],
            engines=[{**SCRIPTED, "name": "one"}, {**SCRIPTED, "name": "two"}],
        )
        changes = {change["key"]: change for change in client.reload()["changes"]}
        assert changes["data_source_weights.easy"]["new"] == "lambda step: 1"
        assert changes["rollout.rollout_batch_size"]["is_live"]
        assert not changes["rollout.chunk_tokens"]["is_live"]
        assert counts(client, 4) == {"easy": 16, "code": 16}
        status = client.status()
        assert list(status["sources"]) == ["easy", "code"]
        assert {engine["name"] for engine in status["engines"]} == {"one", "two"}
        assert status["retired"]["hard"]["dropped"]["source_removed"]["groups"] > 0
        assert_accounted(status)
        assert client.reload()["changes"] == [changes["rollout.chunk_tokens"]], "it waits for the next start still"

        process.kill()
        process.start()
        with process.connect() as after:
            assert counts(after, 2) == {"easy": 8, "code": 8}
            assert_accounted(after.status())
            assert after.reload()["changes"] == []


def test_a_source_that_is_the_same_goes_on_undisturbed(tmp_path: Path) -> None:
    more: dict[str, Any] = {
        "engines": [{"kind": "scripted", "tokens_per_s": 20.0}],  # 16 tokens at a time: four times in three seconds
        "sampling": {"max_new_tokens": 64},
    }
    config = write_config(tmp_path, **more)
    pieces: dict[str, set[int]] = {"easy": set(), "hard": set()}
    with daemon(config) as process, process.connect() as client:
        deadline = time.monotonic() + 30
        while not client.status()["engines"][0]["tokens"]:
            assert time.monotonic() < deadline
        write_config(tmp_path, data_sources=[source("easy"), source("hard", sampling={"max_new_tokens": 60})], **more)
        keys = [change["key"] for change in client.reload()["changes"]]
        assert keys == ["data_sources.hard.sampling.max_new_tokens"]
        for _ in range(2):
            batch = client.get_batch(timeout_s=30)
            client.ack(batch.lease)
            for group in batch.groups:
                pieces[group.source].update(sample.metadata.get("pieces", 1) for sample in group.samples)
                lengths = {len(sample.response_tokens) for sample in group.samples}
                assert lengths == {64 if group.source == "easy" else 60}
    assert pieces == {"easy": {1}, "hard": {2}}, "what was parked went on"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_source_weights": [0.7]}, "data_source_weights"),
        ({"data_source_weights": [0.7, "lambda step: oops"]}, "oops"),
        ({"data_source_weights": [0.7, "no.such.function"]}, "no.such"),
        ({"rollout": {"rollout_batch_sise": 4}}, "rollout_batch_size"),
        ({"data_sources": [source("easy"), source("gone")]}, "gone.jsonl"),
        ({"data_sources": [source("easy"), source("hard", reward="no.such.reward")]}, "no.such"),
        ({"engines": [{"kind": "scripted"}, {"kind": "scripted", "vocabulary": 7}]}, "engines"),
    ],
)
def test_any_error_keeps_the_config(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    config = write_config(tmp_path)
    with daemon(config) as process, process.connect() as client:
        counts(client, 1)
        write_config(tmp_path, **changes)
        with pytest.raises(ConfigRefused, match=message):
            client.reload()
        status = client.status()
        assert list(status["sources"]) == ["easy", "hard"]
        assert len(status["engines"]) == 1
        assert sum(counts(client, 3).values()) == 12
        write_config(tmp_path)
        assert client.reload()["changes"] == []
        assert process.stop() == 0


def wait_for_line(process: DaemonProcess, text: str) -> None:
    deadline = time.monotonic() + 30
    while not any(text in line["message"] for line in process.log):
        assert time.monotonic() < deadline, f"no line says {text!r}"


def test_sighup_reloads_and_says_what_has_changed(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    with daemon(config) as process:
        with process.connect() as client:
            counts(client, 1)
        write_config(tmp_path, data_source_weights=[0.5, 0.5])
        process.signal(signal.SIGHUP)
        wait_for_line(process, "the config changed: data_source_weights.easy: 0.7 is now 0.5")
        config.write_text("rollout: [")
        process.signal(signal.SIGHUP)
        wait_for_line(process, "the changed config was refused, nothing changed")
        with process.connect() as client:
            counts(client, 2)
        assert process.stop() == 0


def test_a_weight_set_at_run_time_ends_where_the_file_has_changed_it(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    with daemon(config) as process, process.connect() as client:
        client.set_weight("easy", 0.0)
        client.set_weight("hard", 2.0)
        write_config(tmp_path, data_source_weights=[0.4, 0.3])
        client.reload()
        sources = client.status()["sources"]
        assert not sources["easy"]["weight"]["set_at_run_time"]
        assert sources["hard"]["weight"]["set_at_run_time"]


def test_differences_are_by_name_and_what_is_fixed_stays(tmp_path: Path) -> None:
    old = load_config(write_config(tmp_path))
    write_prompts(tmp_path / "new.jsonl", 3)
    new = load_config(
        write_config(
            tmp_path,
            run={"seed": 4},
            data_sources=[source("hard"), source("new"), source("easy", buffer={"groups": 2})],
            data_source_weights=[0.3, 1.0, 0.7],
        )
    )
    found = {difference.key: difference for difference in differences(old, new)}
    assert found["run.seed"].old == 3
    assert not found["run.seed"].is_live
    assert found["data_sources.easy.buffer.groups"].new == 2
    assert found["data_source_weights.new"].new == 1.0
    assert "data_source_weights.easy" not in found
    assert not any(key.startswith("data_sources.hard") for key in found)
    kept = with_fixed(old, new)
    assert kept.run == old.run
    assert [difference.key for difference in differences(new, kept)] == ["run.seed"]


def test_what_has_changed_is_said_as_a_config_says_it_and_what_comes_and_goes_in_a_line(tmp_path: Path) -> None:
    engine = {"kind": "scripted", "name": "a.b:1"}
    old = load_config(write_config(tmp_path, engines=[engine, {**engine, "name": "two"}]))
    write_prompts(tmp_path / "new.jsonl", 3)
    new = load_config(
        write_config(
            tmp_path,
            run={"seed": 4},
            engines=[engine, {**engine, "name": "three"}],
            data_sources=[source("hard"), source("new")],
            data_source_weights=[0.3, "lambda step: 1"],
        )
    )
    assert set(described([asdict(difference) for difference in differences(old, new)])) == {
        "run.seed: 3 -> 4 (after a restart)",
        "engines.two: removed",
        "engines.three: added",
        "data_sources.easy: removed",
        "data_sources.new: added",
        "data_source_weights.easy: 0.7 -> null",
        'data_source_weights.new: null -> "lambda step: 1"',
    }
