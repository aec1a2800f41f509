"""Asynchronous rewards that cancel, never end, or block: real daemons, which go on and say whose fault it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestrator.client import RolloutClient
from tests.support.daemon_process import DaemonProcess, daemon, write_config

REWARDS = '''
import asyncio, time

async def cancels(sample, prompt):
    """For real: equal judge requests share one task, and the deadline of one caller cancels it for its sibling."""
    if sample.index % 3 == 1:
        raise asyncio.CancelledError
    return 1.0

async def always_cancels(sample, prompt):
    raise asyncio.CancelledError

async def never_ends(sample, prompt):
    while True:
        try:
            await asyncio.sleep(60)
        except:
            pass

async def blocks(sample, prompt):
    time.sleep(0.8)
    return 1.0

def fine(sample, prompt):
    return float(sample.index % 2)
'''


@contextmanager
def run(folder: Path, reward: str, **options: float) -> Iterator[tuple[DaemonProcess, RolloutClient]]:
    (folder / "own_rewards.py").write_text(REWARDS)
    config = write_config(
        folder,
        data_sources=[
            {"name": "easy", "prompts": {"path": "easy.jsonl"}, "reward": {"path": f"own_rewards.{reward}"} | options},
            {"name": "hard", "prompts": {"path": "hard.jsonl"}, "reward": "contains"},
        ],
        data_source_weights=[0.5, 0.5],
    )
    with daemon(config) as process, process.connect() as client:
        yield process, client


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def test_a_cancellation_that_is_not_ours_fails_that_call_alone(tmp_path: Path) -> None:
    with run(tmp_path, "cancels") as (process, client):
        for _ in range(3):
            client.ack(client.get_batch(timeout_s=30).lease)
        process.wait_for_line("it raised asyncio.exceptions.CancelledError")
        assert process.stop() == 0


def test_a_source_whose_reward_always_cancels_does_not_stop_the_other(tmp_path: Path) -> None:
    with run(tmp_path, "always_cancels") as (process, client):
        client.set_weight("easy", 0.0)
        for _ in range(3):
            client.ack(client.get_batch(timeout_s=30).lease)
        assert client.status()["sources"]["easy"]["reward"]["failed"] > 0
        assert process.stop() == 0
        process.start()
        with process.connect() as again:  # the group that was in flight did not end the daemon at its start
            again.ack(again.get_batch(timeout_s=30).lease)
        assert process.stop() == 0


def test_a_reward_that_ignores_cancellation_is_given_up_and_holds_no_end_up(tmp_path: Path) -> None:
    with run(tmp_path, "never_ends", timeout_s=0.2) as (process, client):
        process.wait_for_line("it ignores cancellation and runs on")
        assert client.status()["sources"]["easy"]["reward"]["extra"]["abandoned"] > 0
        assert process.stop() == 0
    assert any("left behind" in line["message"] for line in process.log)


def test_a_reward_that_blocks_the_loop_is_named(tmp_path: Path) -> None:
    with run(tmp_path, "blocks") as (process, client):
        process.wait_for_line("by asynchronous reward own_rewards.blocks")
        loop = client.status()["loop"]
        assert loop["hold_ups"] >= 1
        assert loop["longest_s"] > 0.5
        process.kill()
