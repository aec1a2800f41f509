"""Foreign coroutines may raise, cancel, swallow and block: the call ends all the same, and says what happened."""

from __future__ import annotations

import asyncio
import math
import subprocess
import sys

import anyio
import pytest

from orchestrator.concurrency import foreign
from orchestrator.concurrency.foreign import ForeignError, ForeignRefused, ForeignTasks, ForeignTimeout
from tests.support.paths import ROOT
from tests.support.turning import turned


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> ForeignTasks:
    monkeypatch.setattr(foreign, "CANCELLATION_S", 0.01)
    return ForeignTasks("test.reward")


@pytest.mark.parametrize(
    "error",
    [
        ValueError("x"),
        asyncio.CancelledError(),
        SystemExit(3),
        KeyboardInterrupt(),
        GeneratorExit(),
        BaseExceptionGroup("several", [asyncio.CancelledError(), ValueError("y")]),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_whatever_it_raises_is_an_error_of_that_call(tasks: ForeignTasks, error: BaseException) -> None:
    async def raises() -> None:
        await asyncio.sleep(0)
        raise error

    with pytest.raises(ForeignError) as caught:
        await tasks.call(raises, timeout_s=5)
    assert caught.value.error is error
    assert tasks.abandoned == 0


async def test_what_it_returns_comes_back_and_none_is_a_value(tasks: ForeignTasks) -> None:
    async def returns(value: object) -> object:
        await asyncio.sleep(0)
        return value

    assert await tasks.call(lambda: returns(7), timeout_s=math.inf) == 7
    assert await tasks.call(lambda: returns(None), timeout_s=5) is None


async def test_a_function_that_raises_before_it_is_awaited(tasks: ForeignTasks) -> None:
    def raises() -> asyncio.Future[None]:
        raise asyncio.CancelledError

    with pytest.raises(ForeignError):
        await tasks.call(raises, timeout_s=5)


async def test_a_shared_task_that_is_cancelled_fails_its_other_users_and_cancels_nobody(tasks: ForeignTasks) -> None:
    """Equal requests to a judge share one task: the deadline of one caller cancels it for all."""
    shared = asyncio.create_task(asyncio.sleep(60))
    with pytest.raises(ForeignTimeout):
        await tasks.call(lambda: shared, timeout_s=0.01)
    with pytest.raises(ForeignError) as caught:
        await tasks.call(lambda: shared, timeout_s=5)
    assert isinstance(caught.value.error, asyncio.CancelledError)


async def test_one_that_ends_when_cancelled_is_late_and_not_abandoned(tasks: ForeignTasks) -> None:
    with pytest.raises(ForeignTimeout) as caught:
        await tasks.call(lambda: asyncio.sleep(60), timeout_s=0.01)
    assert not caught.value.was_abandoned
    assert (tasks.abandoned, tasks.abandoned_total) == (0, 0)


async def swallow(stop: asyncio.Event) -> None:
    while not stop.is_set():
        try:
            await stop.wait()
        except asyncio.CancelledError:
            continue


async def test_one_that_swallows_cancellation_is_abandoned_and_counted(tasks: ForeignTasks) -> None:
    stop = asyncio.Event()
    with anyio.fail_after(5):
        with pytest.raises(ForeignTimeout) as caught:
            await tasks.call(lambda: swallow(stop), timeout_s=0.01)
    assert caught.value.was_abandoned
    assert (tasks.abandoned, tasks.abandoned_total) == (1, 1)
    stop.set()
    await turned(lambda: not tasks.abandoned)
    assert tasks.abandoned_total == 1


async def test_our_own_cancellation_does_not_wait_for_it(tasks: ForeignTasks) -> None:
    stop = asyncio.Event()
    with anyio.fail_after(5):
        with anyio.move_on_after(0.01) as scope:
            await tasks.call(lambda: swallow(stop), timeout_s=math.inf)
        assert scope.cancelled_caught
        await turned(lambda: tasks.abandoned_total)
    assert tasks.abandoned == 1
    stop.set()
    await turned(lambda: not tasks.abandoned)


async def test_too_many_that_were_abandoned_refuse_the_next(
    tasks: ForeignTasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foreign, "MAX_ABANDONED", 2)
    stop = asyncio.Event()
    for _ in range(2):
        with pytest.raises(ForeignTimeout):
            await tasks.call(lambda: swallow(stop), timeout_s=0.0)
    with pytest.raises(ForeignRefused, match="2 earlier calls"):
        await tasks.call(lambda: asyncio.sleep(0), timeout_s=1)
    stop.set()
    await turned(lambda: not tasks.abandoned)
    await tasks.call(lambda: asyncio.sleep(0), timeout_s=1)


def test_a_process_ends_although_a_task_swallows_every_cancellation() -> None:
    """Without ``unfinished_tasks`` the end of the loop waits for it for ever."""
    program = """
import asyncio, os
from orchestrator.concurrency.foreign import unfinished_tasks

async def stubborn():
    while True:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            pass

async def main():
    asyncio.create_task(stubborn(), name="foreign code: judge")
    await asyncio.sleep(0)
    rest = await unfinished_tasks(patience_s=0.05)
    print(rest, flush=True)
    os._exit(0 if rest else 1)

asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == b"['foreign code: judge']\n"
