"""A real daemon and rewards that hang, crash, are away, or score whole groups."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from orchestrator.client import RolloutClient
from orchestrator.errors import BatchTimeout
from tests.campaigns.checks import until
from tests.daemon.test_end_to_end import assert_accounts
from tests.daemon.test_regressions import put_reward
from tests.status.test_http import free_port
from tests.support.daemon_process import daemon, write_config
from tests.support.reward_server import reward_server

pytestmark = pytest.mark.timeout(120)


def config_of(folder: Path, reward: Any, **changes: Any) -> Path:
    """A config of one source with that reward."""
    sources = [{"name": "easy", "prompts": {"path": "easy.jsonl"}, "reward": reward}]
    return write_config(folder, data_sources=sources, data_source_weights=[1], **changes)


def cause_with(client: RolloutClient, words: str) -> dict[str, Any]:
    """Wait for a batch until the cause has these words; returns the status."""
    deadline = time.monotonic() + 60
    while True:
        with pytest.raises(BatchTimeout) as caught:
            client.get_batch(timeout_s=0.3)
        status = client.status()
        if words in str(caught.value) and words in status["cause"]["sentence"]:
            return status
        assert time.monotonic() < deadline, str(caught.value)


def rewards_of(batch: Any) -> list[list[float]]:
    return [[sample.reward for sample in group.samples] for group in batch.groups]


# -- what is wrong is named -------------------------------------------------------------------------------------------


def test_a_function_that_hangs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put_reward(tmp_path, monkeypatch, "time.sleep(600)")
    config = config_of(tmp_path, {"path": path, "timeout_s": 0.2, "concurrency": 2})
    with daemon(config) as process, process.connect() as client:
        status = cause_with(client, f"its reward {path} hung ")
        assert "times (its workers were killed); last error: no answer within 0.2 s" in status["cause"]["sentence"]
        reward = status["sources"]["easy"]["reward"]
        assert (reward["name"], reward["kind"], reward["scored"]) == (path, "process", 0)
        assert reward["extra"]["processes_started"] >= reward["timed_out"] >= 3
        assert reward["extra"]["processes"] <= 2
        assert set(status["sources"]["easy"]["dropped"]) <= {"reward_timeout"}
        assert_accounts(status)


def test_a_function_that_crashes_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put_reward(tmp_path, monkeypatch, "import os; os._exit(7)")
    with daemon(config_of(tmp_path, {"path": path, "concurrency": 2})) as process, process.connect() as client:
        status = cause_with(client, f"its reward {path} failed ")
        assert "its worker process exited with code 7 before it answered" in status["cause"]["sentence"]
        assert set(status["sources"]["easy"]["dropped"]) <= {"reward_failed"}


def test_a_server_that_hangs_is_named(tmp_path: Path) -> None:
    with reward_server(lambda _: 1.0) as server:
        server.loud.clear()
        reward = {"kind": "http", "url": server.url, "timeout_s": 0.2}
        with daemon(config_of(tmp_path, reward)) as process, process.connect() as client:
            status = cause_with(client, f"its reward {server.url} hung ")
            assert "(the connections were closed)" in status["cause"]["sentence"]
            server.loud.set()
            assert rewards_of(client.get_batch(timeout_s=60)) == [[1.0, 1.0]] * 4


def test_a_server_that_is_away_is_named_and_costs_no_generation(tmp_path: Path) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}/score"
    with daemon(config_of(tmp_path, {"kind": "http", "url": url})) as process, process.connect() as client:
        cause_with(client, f"its reward server {url} is unavailable or busy, and calls wait for it: ")
        with reward_server(lambda body: body["index"], port=port):
            batch = client.get_batch(timeout_s=60)
            assert rewards_of(batch) == [[float(s.index) for s in group.samples] for group in batch.groups]
            status = client.status()
            assert status["sources"]["easy"]["producer"]["failed_samples"] == 0
            assert not status["sources"]["easy"]["dropped"]
            assert status["sources"]["easy"]["reward"]["in_a_row"] == 0


# -- whole groups -----------------------------------------------------------------------------------------------------


def by_position(body: dict[str, Any]) -> list[int]:
    return list(range(len(body["samples"])))


def test_a_group_is_scored_once_and_as_a_whole(tmp_path: Path) -> None:
    with reward_server(by_position) as server:
        reward = {"kind": "http", "url": server.url, "group": True}
        config = config_of(tmp_path, reward, rollout={"n_samples_per_prompt": 3, "num_rollout": 3})
        with daemon(config) as process, process.connect() as client:
            for batch in client.batches(timeout_s=30):
                assert rewards_of(batch) == [[0.0, 1.0, 2.0]] * 4
            asked = Counter(tuple(sample["index"] for sample in body["samples"]) for body in server.requests)
            assert len(asked) >= 12
            assert set(asked.values()) == {1}


def test_a_failed_sample_is_replaced_before_its_group_is_scored(tmp_path: Path) -> None:
    with reward_server(by_position) as server:
        reward = {"kind": "http", "url": server.url, "group": True}
        engines = [{"kind": "scripted", "time_scale": 0.0, "reset_rate": 0.3}]
        config = config_of(tmp_path, reward, engines=engines, engine_defaults={"max_retries": 0})
        with daemon(config) as process, process.connect() as client:
            for _ in range(5):
                batch = client.get_batch(timeout_s=60)
                assert rewards_of(batch) == [[0.0, 1.0]] * 4
                client.ack(batch.lease)
            status = client.status()
            assert status["sources"]["easy"]["producer"]["replaced_samples"] > 0
            assert all(len(body["samples"]) == 2 for body in server.requests)
            assert all(s["status"] in ("completed", "truncated") for body in server.requests for s in body["samples"])
            assert_accounts(status)


def test_a_group_reward_that_fails_is_asked_twice_and_drops_the_group(tmp_path: Path) -> None:
    """Half of the prompts cannot be scored: their groups are counted, never handed out, and no sample is replaced."""
    with reward_server(lambda body: by_position(body) if body["prompt_index"] % 2 else [1.0]) as server:
        reward = {"kind": "http", "url": server.url, "group": True}
        with daemon(config_of(tmp_path, reward)) as process, process.connect() as client:
            for _ in range(3):
                batch = client.get_batch(timeout_s=60)
                assert all(group.prompt_index % 2 for group in batch.groups)
                assert rewards_of(batch) == [[0.0, 1.0]] * 4
                client.ack(batch.lease)
            source = client.status()["sources"]["easy"]
            assert list(source["dropped"]) == ["reward_failed"]
            assert source["producer"]["replaced_samples"] == 0
        tries = Counter(body["samples"][0]["index"] for body in server.requests if not body["prompt_index"] % 2)
        assert max(tries.values()) == 2


def test_a_group_that_was_parked_before_its_scoring_is_scored_after_the_restart(tmp_path: Path) -> None:
    with reward_server(by_position) as server:
        server.loud.clear()
        reward = {"kind": "http", "url": server.url, "group": True, "timeout_s": 600}
        with daemon(config_of(tmp_path, reward)) as process:
            server.wait_for(4)
            before = {body["prompt_index"]: body for body in server.requests}
            assert process.stop() == 0
            config_of(tmp_path, reward, engines=[{"kind": "scripted", "time_scale": 0.0, "seed": 9}])
            asked = len(server.requests)
            server.loud.set()
            process.start()
            with process.connect() as client:
                batch = client.get_batch(timeout_s=30)
                assert rewards_of(batch) == [[0.0, 1.0]] * 4
                assert_accounts(client.status())
                until(
                    lambda: before.keys() <= {body["prompt_index"] for body in server.requests[asked:]}, "all of them"
                )
            again = {body["prompt_index"]: body for body in server.requests[asked:]}
            assert {index: again[index] for index in before} == before, "an engine of another seed would give others"


# -- tasks ------------------------------------------------------------------------------------------------------------

PACKAGE = """
from . import factory

class Sums(list):
    def __init__(self, size, seed):
        super().__init__(range(size))

    def __getitem__(self, index):
        if index % 3 == 2:
            raise RuntimeError("nothing comes to mind")
        if index % 3 == 1 and index > 3:
            __import__("os")._exit(7)
        return {"question": f"0+{index}=", "answer": str(index), "metadata": {"range": (0, index)}}

    def score_answer(self, answer, entry):
        assert isinstance(entry["metadata"]["range"], tuple)
        return 0.25 if answer == entry["answer"] else 0.0

def create_dataset(name, **options):
    return Sums(**options)
"""


def test_entries_that_cannot_be_made_cost_their_groups_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for reasoning-gym with a task that raises at some of its entries and ends its process at others."""
    (tmp_path / "reasoning_gym").mkdir()
    (tmp_path / "reasoning_gym" / "__init__.py").write_text(PACKAGE)
    (tmp_path / "reasoning_gym" / "factory.py").write_text("DATASETS = {'sums': None}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    sources = [{"name": "puzzles", "prompts": {"path": "reasoning_gym:sums", "size": 12}}]
    engines = [{"kind": "scripted", "time_scale": 0.0, "echo_rate": 1.0}]
    config = write_config(tmp_path, data_sources=sources, data_source_weights=[1], engines=engines)
    with daemon(config) as process, process.connect() as client:
        for _ in range(3):
            batch = client.get_batch(timeout_s=60)
            assert {group.prompt_index for group in batch.groups} <= {0, 1, 3, 6, 9}
            assert all(group.label == str(group.prompt_index) for group in batch.groups)
            assert rewards_of(batch) == [[0.25, 0.25]] * 4
            client.ack(batch.lease)
        status = client.status()
        assert list(status["sources"]["puzzles"]["dropped"]) == ["prompt_failed"]
        assert "cannot create entry" in status["sources"]["puzzles"]["producer"]["last_failure"]
        assert_accounts(status)
