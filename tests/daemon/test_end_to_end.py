"""A real daemon in its own process, a real socket, real files, real signals; the scripted engine generates."""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from orchestrator.client import Batch, RolloutClient
from orchestrator.errors import BadRequest, BatchTimeout, RunFinished, SourceUnknown, VersionWentBack
from tests.support.daemon_process import DaemonProcess, daemon, write_config, write_prompts
from tests.support.paths import ROOT

pytestmark = pytest.mark.timeout(120)


def raw(batch: Batch) -> list[bytes]:
    """The group frames of a batch as they came."""
    return [bytes(group.frame.buffer) for group in batch.groups]


def take(
    client: RolloutClient, count: int, *, ack: bool = True, timeout_s: float = 30
) -> list[tuple[str, list[bytes]]]:
    """Take batches one by one; returns leases and frames."""
    taken = []
    for _ in range(count):
        batch = client.get_batch(timeout_s=timeout_s)
        taken.append((batch.lease, raw(batch)))
        if ack:
            client.ack(batch.lease)
    return taken


def group_indices(frames: list[bytes]) -> list[int]:
    from orchestrator.frames import GroupFrame

    return [GroupFrame(frame).header["group_index"] for frame in frames]


def assert_accounts(status: dict[str, Any]) -> None:
    """G3: every launched group is in exactly one place."""
    total = 0
    for source in status["sources"].values():
        groups = source["groups"]
        rest = sum(groups[key] for key in ("in_flight", "buffered", "leased", "acknowledged", "dropped"))
        assert groups["launched"] == rest
        total += groups["launched"]
    assert total == status["next_group_index"]


def wait_for_tokens(client: RolloutClient, more_than: int) -> int:
    """Ask for the status until the engines have given more tokens; returns how many."""
    deadline = time.monotonic() + 30
    while (tokens := sum(engine["tokens"] for engine in client.status()["engines"])) <= more_than:
        assert time.monotonic() < deadline, "no new token"
    return tokens


def test_weighted_batches_arrive(tmp_path: Path) -> None:
    with daemon(write_config(tmp_path)) as process, process.connect() as client:
        counts: Counter[str] = Counter()
        indices = []
        for step, batch in zip(range(10), client.batches(timeout_s=30), strict=False):
            assert batch.step == step
            assert sum(batch.counts.values()) == len(batch.groups) == 4
            assert batch.weights == pytest.approx({"easy": 0.7, "hard": 0.3})
            counts.update(group.source for group in batch.groups)
            indices += [group.group_index for group in batch.groups]
        assert counts == {"easy": 28, "hard": 12}
        assert len(set(indices)) == 40
        assert_accounts(client.status())


def test_sigkill_loses_no_acknowledged_batch_and_repeats_the_other(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    with daemon(config) as process:
        seen: list[int] = []
        pending: tuple[str, list[bytes]] | None = None
        for _ in range(4):
            with process.connect() as client:
                if pending is not None:
                    assert take(client, 1)[0] == pending, "the very same batch, to the byte, under the same lease"
                for _, frames in take(client, 3):
                    seen += group_indices(frames)
                pending = take(client, 1, ack=False)[0]
                seen += group_indices(pending[1])
                process.kill()
            process.start()
        assert len(set(seen)) == len(seen) == 4 * 4 * 4, "nothing is handed out twice but what was not acknowledged"
        with process.connect() as client:
            status = client.status()
            assert status["step"] == 16
            assert status["sources"]["easy"]["handed_out"] == pytest.approx(0.7 * 64, abs=1)
            assert_accounts(status)
            assert not status["problems"]
        assert process.stop() == 0


def test_sigterm_parks_what_is_in_flight_and_the_next_start_continues_it(tmp_path: Path) -> None:
    slow = [{"kind": "scripted", "tokens_per_s": 40.0, "length": None}]
    config = write_config(tmp_path, engines=slow, sampling={"max_new_tokens": 160})
    with daemon(config) as process:
        with process.connect() as client:
            wait_for_tokens(client, 0)
            before = client.status()
            assert before["generation"]["in_flight"] > 0
        assert process.stop() == 0
        process.start()
        with process.connect() as client:
            batch = client.get_batch(timeout_s=30)
            after = client.status()
            samples = [sample for group in batch.groups for sample in group.samples]
            assert all(len(sample.response_tokens) == 160 for sample in samples)
            assert any(sample.metadata.get("pieces", 1) > 1 for sample in samples), "continued, not begun anew"
            launched = {name: source["groups"]["launched"] for name, source in before["sources"].items()}
            assert next(group.group_index for group in batch.groups) < sum(launched.values())
            assert_accounts(after)


def test_a_prompt_may_ask_for_a_shorter_response_and_never_for_a_longer_one(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}", "label": "", "most": 2 + n % 9} for n in range(20)]
    (tmp_path / "easy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    easy = {"name": "easy", "prompts": {"path": "easy.jsonl", "max_new_tokens_key": "most"}}
    endless = [{"kind": "scripted", "time_scale": 0.0, "length": None}]
    config = write_config(tmp_path, engines=endless, data_sources=[easy], data_source_weights=[1])
    with daemon(config) as process, process.connect() as client:
        for _, batch in zip(range(4), client.batches(timeout_s=30), strict=False):
            for group in batch.groups:
                most = min(8, 2 + group.prompt_index % 9)
                assert group.sampling["max_new_tokens"] == most
                assert [len(sample.response_tokens) for sample in group.samples] == [most, most]


def test_abort_interrupts_and_every_token_has_its_version(tmp_path: Path) -> None:
    slow = [{"kind": "scripted", "tokens_per_s": 100.0, "length": None}]
    config = write_config(tmp_path, engines=slow, sampling={"max_new_tokens": 100})
    with daemon(config) as process, process.connect() as trainer, process.connect() as other:
        tokens = 0
        for version in (1, 2, 3):
            tokens = wait_for_tokens(other, tokens)
            answer = other.set_policy_version(version, mode="abort")
            assert answer["aborted"] == answer["in_flight"] > 0
        with pytest.raises(VersionWentBack):
            other.set_policy_version(2)
        batch = trainer.get_batch(timeout_s=30)
        several = 0
        for sample in (sample for group in batch.groups for sample in group.samples):
            versions = [version for version, _ in sample.versions]
            assert versions == sorted(set(versions))
            assert sum(count for _, count in sample.versions) == len(sample.response_tokens) == 100
            several += len(versions) > 1
        assert several > 0
        assert batch.policy_version == 3


def test_partials_that_are_too_old_are_dropped_counted_and_named(tmp_path: Path) -> None:
    """A trainer that sets versions faster than responses are generated learns why no batch comes."""
    slow = [{"kind": "scripted", "tokens_per_s": 100.0, "length": None}]
    config = write_config(tmp_path, engines=slow, sampling={"max_new_tokens": 2000}, rollout={"max_staleness": 0})
    with daemon(config) as process, process.connect() as client:
        tokens = 0
        for version in (1, 2, 3):
            tokens = wait_for_tokens(client, tokens)
            client.set_policy_version(version, mode="abort")
        with pytest.raises(BatchTimeout, match="went stale and ran again"):
            client.get_batch(timeout_s=0.5)
        status = client.status()
        stale = [source["dropped"].get("stale", {"groups": 0}) for source in status["sources"].values()]
        assert sum(dropped["groups"] for dropped in stale) > 0
        assert_accounts(status)


def test_pause_generation_is_quiet_and_ends_with_its_connection(tmp_path: Path) -> None:
    slow = [{"kind": "scripted", "tokens_per_s": 200.0, "length": None}]
    config = write_config(tmp_path, engines=slow, sampling={"max_new_tokens": 40})
    with daemon(config) as process, process.connect() as trainer:
        pauser = process.connect()
        assert pauser.pause_generation("abort")["in_flight"] == 0
        status = trainer.status()
        assert status["generation"]["paused"]
        assert all(engine["in_flight"] == 0 for engine in status["engines"])
        with pytest.raises(BatchTimeout, match="paused"):
            take(trainer, 100, timeout_s=0.1)  # what was finished before the pause may still come; nothing more does
        with pytest.raises(BadRequest, match="another connection"):
            trainer.pause_generation("abort")
        step = trainer.status()["step"]
        pauser.close()
        assert trainer.get_batch(timeout_s=30).step == step


def test_runtime_changes_survive_a_crash(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    with daemon(config) as process:
        with process.connect() as client:
            client.set_weight("easy", "lambda step: 0")
            client.set_policy_version(7)
            with pytest.raises(SourceUnknown, match="easy, hard"):
                client.set_weight("eazy", 1)
            with pytest.raises(BadRequest):
                client.set_policy_version(-1)
            process.kill()
        process.start()
        with process.connect() as client:
            batch = client.get_batch(timeout_s=30)
            assert (batch.counts, batch.policy_version) == ({"easy": 0, "hard": 4}, 7)
            client.ack(batch.lease)
            client.set_weight("easy", None)
            client.pause("hard")
            assert client.get_batch(timeout_s=30).counts == {"easy": 4, "hard": 0}
            client.resume("hard")


def test_drain_parks_and_a_finished_run_says_so(tmp_path: Path) -> None:
    config = write_config(tmp_path, rollout={"num_rollout": 2})
    with daemon(config) as process:
        with process.connect() as client:
            take(client, 2)
            with pytest.raises(RunFinished):
                client.get_batch(timeout_s=5)
            client.drain()
            assert client.status()["generation"]["draining"]
        assert process.wait() == 0, "a finished run ends by itself once nobody is connected"


def run_cli(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "orchestrator", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=60,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "COLUMNS": "100"},
        check=False,
    )


def test_exit_codes_and_the_commands_that_talk_to_a_daemon(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    sock = str(tmp_path / "sock")
    gone = run_cli("status", "--socket", sock, cwd=tmp_path)
    assert gone.returncode == 1
    assert "orchestrator run" in gone.stderr
    with daemon(config) as process:
        with process.connect() as client:
            take(client, 2)
            second = run_cli("run", str(config), cwd=tmp_path)
            assert second.returncode == 75, second.stderr
            assert str(process.process.pid) in second.stderr
            assert run_cli("set-weight", "hard", "0.9", "--socket", sock, cwd=tmp_path).returncode == 0
            assert run_cli("pause", "easy", "--socket", sock, cwd=tmp_path).returncode == 0
            shown = run_cli("status", "--socket", sock, cwd=tmp_path).stdout
            assert "paused" in shown
            assert "weight set: 0.9" in shown
            assert run_cli("resume", "easy", "--socket", sock, cwd=tmp_path).returncode == 0
            assert run_cli("pause", "nope", "--socket", sock, cwd=tmp_path).returncode == 1
            report = json.loads(run_cli("status", "--json", "--socket", sock, cwd=tmp_path).stdout)
            assert report["step"] == 2
            assert_accounts(report)
        process.signal(signal.SIGINT)
        assert process.wait() == 0
        assert not (tmp_path / "sock").exists()
    (tmp_path / "config.yaml").write_text("run: {nmae: x}\n")
    assert run_cli("run", str(config), cwd=tmp_path).returncode == 78
    assert run_cli("run", cwd=tmp_path).returncode == 2


def test_a_second_signal_ends_at_once_and_nothing_is_lost(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    with daemon(config) as process:
        with process.connect() as client:
            done = take(client, 3)
            process.signal(signal.SIGTERM)
            process.signal(signal.SIGTERM)
        # 0: it had stopped already; 1: it saw the second signal; the signal's own end: at the last snapshot
        assert process.wait() in (0, 1, -signal.SIGTERM)
        process.start()
        with process.connect() as client:
            more = take(client, 2)
        seen = [i for _, frames in done + more for i in group_indices(frames)]
        assert len(set(seen)) == len(seen) == 20


def test_foreign_state_is_refused_before_anything_changes(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    with daemon(config) as process:
        with process.connect() as client:
            take(client, 1)
        assert process.stop() == 0
        write_prompts(tmp_path / "easy.jsonl", 7)
        before = sorted((p.name, p.stat().st_size) for p in (tmp_path / "state").iterdir())
        process.start()
        assert process.wait() == 1
        assert "easy (100 prompts)" in process.stderr
        assert "easy (7 prompts)" in process.stderr
        assert sorted((p.name, p.stat().st_size) for p in (tmp_path / "state").iterdir()) == before


def test_one_source_without_answers_does_not_stop_the_other(tmp_path: Path) -> None:
    """A failing reward of one source is named as the cause, and the other source's groups are there."""
    sources = [
        {"name": "easy", "prompts": {"path": "easy.jsonl"}, "reward": "contains"},
        {"name": "hard", "prompts": {"path": "hard.jsonl"}, "reward": "tests.support.reward_functions.returns"},
    ]
    with daemon(write_config(tmp_path, data_sources=sources)) as process, process.connect() as client:
        with pytest.raises(BatchTimeout, match="hard lacks") as caught:
            client.get_batch(timeout_s=3)
        assert [entry["source"] for entry in caught.value.data["cause"]["sources"]] == ["hard"]
        status = client.status()
        assert status["sources"]["easy"]["groups"]["buffered"] > 0
        assert status["sources"]["hard"]["dropped"]["reward_failed"]["groups"] > 0
        assert_accounts(status)
        client.pause("hard")
        assert client.get_batch(timeout_s=30).counts == {"easy": 4, "hard": 0}


STATISTICS = {"mean": statistics.fmean, "median": statistics.median, "max": max, "min": min}


def test_log_lines_carry_the_metrics_of_each_step(tmp_path: Path) -> None:
    """Every metric name of the format, with the right value: lengths and rewards that differ."""
    engine = {"kind": "scripted", "time_scale": 0.0, "length": [1, 8], "echo_rate": 0.5}
    with daemon(write_config(tmp_path, engines=[engine])) as process:
        with process.connect() as client:
            batches = {}
            for _ in range(3):
                batch = client.get_batch(timeout_s=30)
                batches[batch.step] = batch
                client.ack(batch.lease)
            expected = {
                (step, name): [sample for g in batch.groups if g.source == name for sample in g.samples]
                for step, batch in batches.items()
                for name in ("easy", "hard")
            }
            lengths = {key: [len(s.response_tokens) for s in samples] for key, samples in expected.items()}
            rewards = {key: [s.reward for s in samples] for key, samples in expected.items()}
        assert process.stop() == 0
        lines = [line for line in process.log if line["event"]["dataset"] in ("step", "step.source")]
    per_source = {(li["rollout"]["step"], li["source"]["name"]): li["rollout"] for li in lines if "source" in li}
    slashed = {line["rollout"]["step"]: line["metrics"] for line in lines if "metrics" in line}
    for (step, name), values in lengths.items():
        line = per_source[step, name]
        assert line["sample_count"] == len(values)
        assert line["response_len"]["mean"] == pytest.approx(sum(values) / max(1, len(values)))
        assert slashed[step][f"rollout/{name}/sample_count"] == len(values)
        assert slashed[step][f"rollout/{name}/weight"] == pytest.approx({"easy": 0.7, "hard": 0.3}[name])
        for metric, numbers in (("response_len", values), ("raw_reward", rewards[step, name])):
            for statistic, function in STATISTICS.items():
                found = (slashed[step][f"rollout/{name}/{metric}/{statistic}"], line[metric][statistic])
                assert found == pytest.approx((function(numbers),) * 2), (step, name, metric, statistic)


def test_restarting_many_times_is_harmless(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    process = DaemonProcess(config)
    try:
        for step in range(4):
            process.start()
            with process.connect() as client:
                assert client.hello()["step"] == step
                take(client, 1)
            assert process.stop() == 0
        files = list((tmp_path / "state").iterdir())
        assert len(files) < 12, "old segments and snapshots are removed"
    finally:
        process.close()
