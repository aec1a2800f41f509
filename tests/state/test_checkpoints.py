"""Named checkpoints: exactly that moment comes back, whatever happened since and whatever is injured."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from orchestrator.client import RolloutClient
from orchestrator.errors import BadRequest, CheckpointError, ForeignState, LeaseUnknown
from tests.daemon.test_end_to_end import assert_accounts, group_indices, raw, run_cli, take, wait_for_tokens
from tests.support.daemon_process import DaemonProcess, daemon, write_config, write_prompts

pytestmark = pytest.mark.timeout(120)

SLOW = [{"kind": "scripted", "tokens_per_s": 400.0, "length": None}]
SCHEDULE = ["lambda step: 0.9 - 0.1 * min(step, 8)", "lambda step: 0.1 + 0.1 * min(step, 8)"]


SOURCE_FACTS = ("weight", "paused", "carry", "cursor", "groups", "dropped", "handed_out")


def prompts_of(frames: list[bytes]) -> list[tuple[str, int, int]]:
    from orchestrator.frames import GroupFrame

    headers = [GroupFrame(frame).header for frame in frames]
    return [(header["source"], header["epoch"], header["prompt_index"]) for header in headers]


def facts(client: RolloutClient) -> dict[str, Any]:
    """What a checkpoint has to bring back, as far as the status tells."""
    status = client.status()
    return {
        "step": status["step"],
        "policy_version": status["policy_version"],
        "next_group_index": status["next_group_index"],
        "sources": {
            name: {
                key: source[key] for key in ("weight", "paused", "carry", "cursor", "groups", "dropped", "handed_out")
            }
            for name, source in status["sources"].items()
        },
    }


# -- going back -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_restarted", [False, True])
def test_exactly_that_moment_comes_back(tmp_path: Path, is_restarted: bool) -> None:
    config = write_config(tmp_path, data_source_weights=SCHEDULE)
    with daemon(config) as process:
        with process.connect() as client:
            take(client, 3)
            client.set_weight("hard", 0.7)
            client.set_policy_version(5)
            held = client.get_batch(timeout_s=30)
            client.set_policy_version(5)
            client.drain()
            before = facts(client)
            assert client.save("five", 2)["step"] == 4
            client.close()
        process.stop()
        process.start()
        with process.connect() as client:
            again = client.get_batch(timeout_s=30)
            assert (again.lease, raw(again)) == (held.lease, raw(held))
            client.set_policy_version(5)
            client.ack(again.lease)
            take(client, 4)
            client.set_weight("hard", None)
            client.set_weight("easy", 0.0)
            client.set_policy_version(9)
            unacknowledged = client.get_batch(timeout_s=30)
            if is_restarted:
                client.close()
                process.kill()
                process.start()
                client = process.connect()
            assert client.load("five")["step"] == 4
            client.drain()
            assert facts(client) == before
            with pytest.raises(LeaseUnknown):
                client.ack(unacknowledged.lease)
            with pytest.raises(LeaseUnknown):
                client.ack(held.lease)
            process.kill()  # what was loaded survives
            client.close()
        process.start()
        with process.connect() as client:
            assert facts(client)["step"] == 4
            redelivered = client.get_batch(timeout_s=30)
            assert redelivered.step == 3
            assert raw(redelivered) == raw(held), "its leases are handed out again"
            assert redelivered.lease != held.lease
            client.ack(redelivered.lease)
            with pytest.raises(BadRequest, match="below 5"):
                client.set_policy_version(4)
            client.set_policy_version(6)
            taken = take(client, 4)
            indices = [index for _, frames in taken for index in group_indices(frames)]
            assert len(set(indices)) == len(indices)
            assert not set(indices) & set(group_indices(raw(held)))
            assert_accounts(client.status())


def test_nothing_is_generated_after_a_load_until_a_version_is_set(tmp_path: Path) -> None:
    config = write_config(tmp_path, engines=SLOW, sampling={"max_new_tokens": 40})
    with daemon(config) as process, process.connect() as client:
        take(client, 1)
        client.save("one")
        take(client, 2)
        client.load("one")
        engine = client.engines()[0]
        assert engine["state"] == "outdated"
        cause = client.status()["cause"]
        assert cause is None or "set_policy_version" in cause["sentence"]
        assert client.engines()[0]["tokens"] == engine["tokens"]
        client.set_policy_version(1)
        take(client, 3)
        assert_accounts(client.status())


def test_the_same_prompts_run_again_after_a_load(tmp_path: Path) -> None:
    """What is handed out after a load is of the prompts that were handed out after the save: none is skipped."""
    config = write_config(tmp_path, rollout={"rollout_batch_size": 4, "n_samples_per_prompt": 1, "lookahead": 1})
    with daemon(config) as process, process.connect() as client:
        client.set_policy_version(0)
        take(client, 2)
        client.save("two")
        first = [prompt for _, frames in take(client, 12) for prompt in prompts_of(frames)]
        client.load("two")
        client.set_policy_version(0)
        second = [prompt for _, frames in take(client, 12) for prompt in prompts_of(frames)]
        assert len(set(first)) == len(first)
        for source in ("easy", "hard"):
            ours, theirs = ({p for p in some if p[0] == source} for some in (first, second))
            assert len(ours ^ theirs) <= 8, "they differ only in what was in flight at the end"


def test_partial_rollouts_are_part_of_a_checkpoint(tmp_path: Path) -> None:
    config = write_config(tmp_path, engines=SLOW, sampling={"max_new_tokens": 400}, rollout={"chunk_tokens": 8})
    with daemon(config) as process, process.connect() as client:
        client.set_policy_version(1)
        tokens = sum(engine["tokens"] for engine in client.status()["engines"])
        wait_for_tokens(client, tokens + 400)  # of the first groups, all of them in flight
        client.save("mid")
        take(client, 1)
        client.load("mid")
        client.set_policy_version(2, mode="abort")
        resumed = [
            sample
            for _ in range(2)
            for group in client.get_batch(timeout_s=30).groups
            for sample in group.samples
            if len(sample.versions) > 1
        ]
        assert resumed, "some went on from tokens of version 1"
        assert all([version for version, _ in sample.versions][-2:] == [1, 2] for sample in resumed)


# -- saving -----------------------------------------------------------------------------------------------------------


def test_what_was_trained_on_is_acknowledged_and_the_rest_is_not(tmp_path: Path) -> None:
    with daemon(write_config(tmp_path)) as process, process.connect() as client:
        one, two = client.get_batch(timeout_s=30), client.get_batch(timeout_s=30)
        client.save("after-one")  # the client fills in the batch in hand, the oldest
        assert [lease["step"] for lease in client.status()["leases"]] == [two.step]
        client.ack(one.lease)
        client.load("after-one")
        client.set_policy_version(0)
        again = client.get_batch(timeout_s=30)
        assert (again.step, raw(again)) == (two.step, raw(two))


def test_a_checkpoint_costs_no_copy_and_one_of_the_same_name_is_replaced(tmp_path: Path) -> None:
    config = write_config(tmp_path, run={"keep_checkpoints": 2})
    with daemon(config) as process, process.connect() as client:
        for name in ("a", "b", "a", "c"):
            take(client, 1)
            client.save(name)
        assert [(entry["name"], entry["step"]) for entry in client.checkpoints()] == [("a", 3), ("c", 4)]
        folder = tmp_path / "state" / "checkpoints"
        assert sorted(entry.name for entry in folder.iterdir()) == ["a", "c"]
        for segment in folder.glob("*/log-*.rol"):
            assert segment.stat().st_nlink > 1
        for name in ("", "../x", ".hidden", "a/b", "x" * 65):
            with pytest.raises(BadRequest, match="cannot be the name of a checkpoint"):
                client.save(name)
        with pytest.raises(CheckpointError, match=r"no checkpoint 'b' in .*; there are: a, c"):
            client.load("b")


def test_checkpoints_by_command(tmp_path: Path) -> None:
    with daemon(write_config(tmp_path)) as process, process.connect() as client:

        def cli(*arguments: str, code: int = 0) -> str:
            done = run_cli("checkpoint", *arguments, "--socket", str(tmp_path / "sock"), cwd=tmp_path)
            assert done.returncode == code, done.stderr
            return done.stdout + done.stderr

        assert "there are no checkpoints" in cli("list")
        take(client, 2)
        assert cli("save", "two", "--trained-through", "1") == "saved checkpoint two at step 2\n"
        take(client, 1)
        assert "two" in cli("list")
        assert cli("verify") == "two: OK\n"
        assert cli("load", "two").startswith("loaded checkpoint two at step 2")
        assert "no checkpoint 'three'" in cli("load", "three", code=1)
        for path in (tmp_path / "state" / "checkpoints" / "two").glob("*.json"):
            path.write_bytes(path.read_bytes()[:-1] + b"!")
        assert "damaged" in cli("verify", "two", code=1)
        assert "checksum" in cli("list")


# -- injuries ---------------------------------------------------------------------------------------------------------


def saved(process: DaemonProcess) -> dict[str, Any]:
    with process.connect() as client:
        take(client, 2)
        client.save("it")
        return facts(client)


def test_a_damaged_checkpoint_is_found_and_changes_nothing(tmp_path: Path) -> None:
    with daemon(write_config(tmp_path)) as process:
        saved(process)
        [segment] = (tmp_path / "state" / "checkpoints" / "it").glob("log-*.rol")
        sound, found = segment.read_bytes(), 0
        with process.connect() as client:
            for where in range(200, len(sound), max(1, len(sound) // 60)):
                # another file, so that the log itself stays sound
                segment.unlink()
                segment.write_bytes(sound[:where] + bytes([sound[where] ^ 4]) + sound[where + 1 :])
                [problems] = client.verify_checkpoints().values()
                if not problems:  # it holds nothing of the checkpoint there
                    continue
                found += 1
                held = client.get_batch(timeout_s=30)
                with pytest.raises(CheckpointError, match="damaged"):
                    client.load("it")
                client.ack(held.lease)
                assert client.status()["step"] == held.step + 1
            segment.unlink()
            assert "missing" in client.verify_checkpoints("it")["it"][0]
            with pytest.raises(CheckpointError, match="missing"):
                client.load("it")
            assert_accounts(client.status())
        assert found >= 20


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_crash_right_after_a_load_does_not_undo_it(tmp_path: Path, number: signal.Signals) -> None:
    with daemon(write_config(tmp_path)) as process:
        saved(process)
        for _ in range(3):
            with process.connect() as client:
                client.set_policy_version(3)
                take(client, 2)
                assert client.load("it")["step"] == 2
            process.signal(number)
            process.wait()
            process.start()
            with process.connect() as client:
                assert client.status()["step"] == 2
                assert not client.status()["problems"]


def test_a_checkpoint_of_other_sources_is_refused_with_both_lists(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    with daemon(config) as process:
        saved(process)
        process.stop()
        (tmp_path / "state").rename(tmp_path / "old")
        (tmp_path / "state").mkdir()
        (tmp_path / "old" / "checkpoints").rename(tmp_path / "state" / "checkpoints")
        write_prompts(tmp_path / "other.jsonl", 100, text="other")
        file = json.loads(config.read_text())
        file["data_sources"][1] = {"name": "other", "prompts": {"path": "other.jsonl"}, "reward": "contains"}
        config.write_text(json.dumps(file))
        process.start()
        with process.connect() as client, pytest.raises(ForeignState, match=r"easy.*hard.*easy.*other"):
            client.load("it")


def test_a_checkpoint_is_loaded_into_an_empty_state_directory(tmp_path: Path) -> None:
    with daemon(write_config(tmp_path, data_source_weights=SCHEDULE)) as process:
        before = saved(process)
        process.stop()
        (tmp_path / "state").rename(tmp_path / "old")
        (tmp_path / "state").mkdir()
        (tmp_path / "old" / "checkpoints").rename(tmp_path / "state" / "checkpoints")
        process.start()
        with process.connect() as client:
            client.ack(client.get_batch(timeout_s=30).lease)
            assert client.load("it") == {"step": 2}
            assert facts(client)["sources"] == before["sources"]
        process.kill()
        process.start()
        with process.connect() as client:
            assert client.status()["problems"] == []
            assert facts(client)["sources"] == before["sources"]
            client.set_policy_version(before["policy_version"])
            assert client.get_batch(timeout_s=30).step == 2
