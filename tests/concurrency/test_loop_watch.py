"""A loop that is held up is noticed by a thread, which names whose code it is."""

from __future__ import annotations

import queue
import time

import anyio
import pytest

from orchestrator.concurrency import loop_watch
from orchestrator.concurrency.foreign import ForeignTasks
from orchestrator.concurrency.loop_watch import HoldUp, LoopWatch
from tests.support.turning import turned


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_watch, "BEAT_S", 0.01)
    monkeypatch.setattr(loop_watch, "LATE_S", 0.2)
    monkeypatch.setattr(loop_watch, "STUCK_S", 0.6)


async def test_foreign_code_that_blocks_is_named_and_when_it_is_stuck_shown() -> None:
    reports: queue.SimpleQueue[HoldUp] = queue.SimpleQueue()
    watch = LoopWatch(reports.put)
    heard: list[HoldUp] = []

    async def blocks_until_told() -> None:
        heard.extend(reports.get(timeout=20) for _ in range(2))  # holds the loop up until the thread has said so twice

    async with anyio.create_task_group() as tasks:
        await tasks.start(watch.run)
        await ForeignTasks("my_rewards.judge").call(blocks_until_told, timeout_s=60)
        first, stuck = heard
        assert (first.culprit, first.is_foreign, first.stack) == ("my_rewards.judge", True, None)
        assert stuck.stack is not None
        assert "blocks_until_told" in stuck.stack
        await turned(lambda: watch.statistics().hold_ups)
        statistics = watch.statistics()
        assert statistics.last_culprit == "my_rewards.judge"
        assert statistics.longest_s >= 0.5
        tasks.cancel_scope.cancel()


async def test_our_own_code_is_named_by_its_place() -> None:
    reports: queue.SimpleQueue[HoldUp] = queue.SimpleQueue()
    async with anyio.create_task_group() as tasks:
        await tasks.start(LoopWatch(reports.put).run)
        found = reports.get(timeout=20)  # as any blocking call in the loop
        assert not found.is_foreign
        assert found.seconds > 0.2
        assert ".py:" in found.culprit
        tasks.cancel_scope.cancel()


async def test_a_report_that_raises_ends_nothing() -> None:
    calls: list[float] = []

    def report(_: HoldUp) -> None:
        calls.append(time.monotonic())
        raise RuntimeError("the log is gone")

    watch = LoopWatch(report)
    async with anyio.create_task_group() as tasks:
        await tasks.start(watch.run)
        for number in (1, 2):
            end = time.monotonic() + 20
            while len(calls) < number and time.monotonic() < end:  # blocks on purpose
                pass
            beat = watch._beat
            await turned(lambda beat=beat: watch._beat != beat)
        tasks.cancel_scope.cancel()
    assert len(calls) >= 2  # a busy machine holds a loop up as well
