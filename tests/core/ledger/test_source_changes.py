"""A run goes on with other sources where that is allowed: what stays, what is dropped, how all is counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import BadRequest, SourceUnknown
from tests.support.daemon_process import DaemonProcess, daemon, write_config, write_prompts


def source(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "prompts": {"path": f"{name}.jsonl"}, "reward": "contains", **more}


def assert_accounted(status: dict[str, Any]) -> None:
    """Every group index is somewhere, whichever source launched it."""
    sources = {**status["sources"], **status["retired"]}
    for name, state in sources.items():
        groups = dict(state["groups"])
        assert groups.pop("launched") == sum(groups.values()), name
    assert status["next_group_index"] == sum(state["groups"]["launched"] for state in sources.values())


def take(process: DaemonProcess, batches: int) -> dict[str, Any]:
    """Train on some batches; returns the status afterwards."""
    with process.connect() as client:
        for _ in range(batches):
            batch = client.get_batch(timeout_s=30)
            client.ack(batch.lease)
        return client.status()


def test_sources_change_between_two_starts_where_that_is_allowed(tmp_path: Path) -> None:
    for name in ("old", "code"):
        write_prompts(tmp_path / f"{name}.jsonl", 100, text=name)
    config = write_config(
        tmp_path, data_sources=[source("easy"), source("hard"), source("old")], data_source_weights=[1, 1, 1]
    )
    with daemon(config) as process:
        with process.connect() as client:
            client.ack(client.get_batch(timeout_s=30).lease)
            held = client.get_batch(timeout_s=30)
            was = client.status()
            in_lease = {group.source for group in held.groups}
        assert process.stop() == 0

        wanted = [source("code"), source("easy"), source("new", renamed_from="old")]
        (tmp_path / "new.jsonl").write_bytes((tmp_path / "old.jsonl").read_bytes())
        write_config(tmp_path, data_sources=wanted, data_source_weights=[1, 1, 1])
        assert process.start().wait() == 1
        assert "hard (100 prompts)" in process.stderr
        assert "code (100 prompts)" in process.stderr
        assert "--allow-source-changes" in process.stderr

        process.start("--allow-source-changes")
        with process.connect() as client:
            now = client.status()
            assert list(now["sources"]) == ["code", "easy", "new"]
            assert set(now["retired"]) == {"hard", "old"}
            assert now["step"] == was["step"]
            assert now["retired"]["hard"]["dropped"]["source_removed"]["groups"] > 0
            assert now["retired"]["old"]["dropped"]["source_renamed"]["groups"] > 0
            assert now["sources"]["new"]["cursor"]["position"] >= was["sources"]["old"]["cursor"]["position"]
            assert_accounted(now)
            again = client.get_batch(timeout_s=30)
            assert [bytes(g.frame.buffer) for g in again.groups] == [bytes(g.frame.buffer) for g in held.groups]
            assert in_lease - set(now["sources"]), "the lease holds groups of sources that are no more"
            client.ack(again.lease)
        assert_accounted(take(process, 6))
        process.kill()

        process.start()  # the change is in the state: it need not be allowed again
        assert_accounted(take(process, 2))
        assert process.stop() == 0


def test_a_source_that_comes_back_goes_on_where_it_was(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    with daemon(config) as process:
        was = take(process, 5)["sources"]["hard"]["cursor"]
        assert process.stop() == 0
        write_config(tmp_path, data_sources=[source("easy")], data_source_weights=[1])
        process.start("--allow-source-changes")
        assert list(take(process, 2)["retired"]) == ["hard"]
        assert process.stop() == 0
        write_config(tmp_path)
        process.start("--allow-source-changes")
        status = take(process, 2)
        assert not status["retired"]
        assert status["sources"]["hard"]["cursor"]["position"] >= was["position"]
        assert status["sources"]["hard"]["dropped"]["source_removed"]["groups"] > 0
        assert_accounted(status)
        assert process.stop() == 0


def test_a_prompt_file_may_grow_and_shrink_where_that_is_allowed(tmp_path: Path) -> None:
    write_prompts(tmp_path / "easy.jsonl", 6)
    config = write_config(tmp_path)
    with daemon(config) as process:
        take(process, 3)
        assert process.stop() == 0
        for rows in (9, 2):
            write_prompts(tmp_path / "easy.jsonl", rows)
            assert process.start().wait() == 1
            process.start("--allow-source-changes")
            status = take(process, 6)
            assert status["sources"]["easy"]["cursor"]["prompts"] == rows
            assert_accounted(status)
            assert process.stop() == 0


def test_sources_come_and_go_at_run_time_and_a_crash_does_not_forget_it(tmp_path: Path) -> None:
    write_prompts(tmp_path / "code.jsonl", 20, text="code")
    code = {"name": "code", "prompts": {"path": str(tmp_path / "code.jsonl")}, "reward": "contains"}
    config = write_config(tmp_path)
    with daemon(config) as process:
        take(process, 3)
        with process.connect() as client:
            client.add_source(code, "lambda step: 1.0", 5.0)
            client.remove_source("hard")
            assert {entry["source"]["name"]: entry["state"] for entry in client.sources()} == {
                "easy": "in_file",
                "code": "added",
                "hard": "removed",
            }
            for wrong, message in (
                (lambda: client.add_source(code, 1.0), "there is already a source 'code'"),
                (lambda: client.add_source({**code, "name": "hard"}, 1.0), "config file has one"),
                (lambda: client.add_source({**code, "name": "gone", "prompts": {"path": "/gone"}}, 1.0), "gone"),
                (lambda: client.add_source({"name": "x"}, 1.0), "prompts"),
                (lambda: client.add_source({**code, "name": "x"}, "lambda step: oops"), "oops"),
                (lambda: client.restore_source("easy"), "no source 'easy' was removed"),
            ):
                with pytest.raises(BadRequest, match=message):
                    wrong()
            with pytest.raises(SourceUnknown):
                client.remove_source("nowhere")
        process.kill()

        process.start()
        status = take(process, 6)
        assert set(status["sources"]) == {"easy", "code"}
        assert status["sources"]["code"]["weight"]["text"] == "lambda step: 1.0"
        assert status["sources"]["code"]["groups"]["acknowledged"] > 8
        assert status["retired"]["hard"]["dropped"]["source_removed"]["groups"] > 0
        assert_accounted(status)
        with process.connect() as client:
            client.restore_source("hard")
            client.remove_source("code")
            assert client.reload()["changes"] == []
        status = take(process, 3)
        assert set(status["sources"]) == {"easy", "hard"}
        assert_accounted(status)
        assert process.stop() == 0
        process.start()
        assert set(take(process, 2)["sources"]) == {"easy", "hard"}


def test_the_file_has_the_last_word_on_sources_where_it_changed(tmp_path: Path) -> None:
    write_prompts(tmp_path / "code.jsonl", 20, text="code")
    config = write_config(tmp_path)
    with daemon(config) as process:
        with process.connect() as client:
            client.add_source(
                {"name": "code", "prompts": {"path": str(tmp_path / "code.jsonl")}, "reward": "contains"}, 1.0
            )
            client.remove_source("hard")
            client.remove_source("easy")
            with pytest.raises(BadRequest, match="only source"):
                client.remove_source("code")
            client.restore_source("easy")
        changed = [source("easy"), source("hard", buffer={"groups": 9}), source("code")]
        write_config(tmp_path, data_sources=changed, data_source_weights=[1, 1, 1])
        with process.connect() as client:
            client.reload()
            assert {entry["source"]["name"]: entry["state"] for entry in client.sources()} == dict.fromkeys(
                ["easy", "hard", "code"], "in_file"
            )
        assert process.stop() == 0
        said = [line["message"] for line in process.log]
        assert "source code, which was added at run time, is replaced by that of the config file" in said
        assert any(line.startswith("source hard was removed at run time. This no longer applies") for line in said)
        process.start()
        assert set(take(process, 2)["sources"]) == {"easy", "hard", "code"}
