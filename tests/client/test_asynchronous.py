"""The asynchronous client against the stub: tasks that share a connection, and cancellation at any point."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anyio
import pytest

from orchestrator.client import AsyncRolloutClient
from orchestrator.errors import BatchTimeout, ConnectionLost, LeaseUnknown
from tests.support.consumer_stub import StubConnection, StubDaemon, stub_daemon


async def until(daemon: StubDaemon, condition: Any) -> None:
    await anyio.to_thread.run_sync(daemon.wait_until, condition)


@pytest.mark.parametrize("prefetch", [False, True])
async def test_the_loop_acknowledges_each_batch_when_the_next_is_asked_for(tmp_path: Path, prefetch: bool) -> None:
    with stub_daemon(tmp_path, 4) as daemon:
        steps = []
        async with AsyncRolloutClient(daemon.path) as client:
            async for batch in client.batches(prefetch=prefetch):
                steps.append(batch.step)
                assert daemon.acked == steps[:-1]
        assert steps == daemon.acked == [0, 1, 2, 3]


async def test_a_large_batch_arrives_whole(tmp_path: Path) -> None:
    with stub_daemon(tmp_path, 2, groups=4, length=200_000) as daemon:
        async with AsyncRolloutClient(daemon.path) as client:
            async for batch in client.batches():
                assert batch.response_lengths.tolist() == [200_000, 200_001] * 4
                assert batch.groups[3].samples[1].response_tokens[-1] == 200_000


async def test_tasks_share_a_connection_while_one_waits_for_a_batch(tmp_path: Path) -> None:
    with stub_daemon(tmp_path, 3) as daemon:
        async with AsyncRolloutClient(daemon.path) as client, anyio.create_task_group() as tasks:
            for _ in range(2):
                await client.get_batch()
            got: list[int] = []

            async def third() -> None:
                got.append((await client.get_batch()).step)

            tasks.start_soon(third)
            await until(daemon, lambda: [m for m, _ in daemon.seen].count("get_batch") == 3)
            assert await client.status() == {"echo": {}}
            assert await client.set_policy_version(1) == {"echo": {"version": 1, "mode": "keep"}}
            assert got == []
            await client.ack("lease-0")
        assert got == [2]
        assert [method for method, _ in daemon.seen].count("hello") == 1


async def test_first_calls_of_several_tasks_make_one_connection(tmp_path: Path) -> None:
    with stub_daemon(tmp_path, 1) as daemon:
        client = AsyncRolloutClient(daemon.path)
        async with anyio.create_task_group() as tasks:
            for _ in range(5):
                tasks.start_soon(client.status)
        assert sorted(method for method, _ in daemon.seen) == ["hello"] + ["status"] * 5
        client.close()


async def test_a_cancelled_wait_leaves_the_connection_intact(tmp_path: Path) -> None:
    with stub_daemon(tmp_path, 3) as daemon:
        async with AsyncRolloutClient(daemon.path) as client:
            for _ in range(2):
                await client.get_batch()
            with anyio.move_on_after(0.05) as scope:
                await client.get_batch()
            assert scope.cancelled_caught
            await client.ack("lease-0")
            assert (await client.get_batch()).step == 2
        methods = [method for method, _ in daemon.seen]
        assert (methods.count("cancel"), methods.count("hello")) == (1, 1)


async def test_cancelled_within_a_payload_the_next_reader_goes_on_and_the_batch_is_given_back(tmp_path: Path) -> None:
    rest: list[bytes] = []

    def half(connection: StubConnection, request_id: int, method: str, _: dict[str, Any]) -> bool:
        if method == "get_batch" and not daemon.given_back:
            data = connection.batch_answer(request_id, 0)
            rest.append(data[700:])
            connection.sock.sendall(data[:700])
            return True
        if method == "cancel" and rest:
            connection.sock.sendall(rest.pop())
        return False

    with stub_daemon(tmp_path, 1, script=half) as daemon:
        async with AsyncRolloutClient(daemon.path) as client:
            with anyio.move_on_after(0.05):
                await client.get_batch()
            assert await client.status() == {"echo": {}}
            await until(daemon, lambda: daemon.given_back == [0])
            assert (await client.get_batch()).lease == "lease-0"
            assert [method for method, _ in daemon.seen].count("hello") == 1


async def test_when_the_reading_task_is_cancelled_another_takes_over(tmp_path: Path) -> None:
    with stub_daemon(tmp_path, 4) as daemon:
        async with AsyncRolloutClient(daemon.path) as client:
            for _ in range(2):
                await client.get_batch()
            async with anyio.create_task_group() as tasks:
                reader = anyio.CancelScope()

                async def doomed() -> None:
                    with reader:
                        await client.get_batch()

                tasks.start_soon(doomed)
                await until(daemon, lambda: [m for m, _ in daemon.seen].count("get_batch") == 3)
                got: list[int] = []

                async def other() -> None:
                    got.append((await client.get_batch()).step)

                tasks.start_soon(other)
                await until(daemon, lambda: [m for m, _ in daemon.seen].count("get_batch") == 4)
                reader.cancel()
                await until(daemon, lambda: "cancel" in [m for m, _ in daemon.seen])
                await client.ack("lease-1")
            assert got == [2]


async def test_a_broken_connection_is_told_to_every_task(tmp_path: Path) -> None:
    with stub_daemon(tmp_path, 2) as daemon:
        async with AsyncRolloutClient(daemon.path) as client:
            for _ in range(2):
                await client.get_batch()
            lost: list[str] = []

            async def waiting() -> None:
                try:
                    await client.get_batch()
                except ConnectionLost as error:
                    lost.append(error.message)

            async with anyio.create_task_group() as tasks:
                for _ in range(3):
                    tasks.start_soon(waiting)
                await until(daemon, lambda: [m for m, _ in daemon.seen].count("get_batch") == 5)
                await anyio.to_thread.run_sync(daemon.drop_connections)
            assert len(lost) == 3


async def test_closing_wakes_who_waits(tmp_path: Path) -> None:
    with stub_daemon(tmp_path, 0) as daemon:
        daemon.script = lambda connection, request_id, method, params: method == "get_batch"
        client = AsyncRolloutClient(daemon.path)

        async def waiting() -> None:
            with pytest.raises(ConnectionLost, match="closed"):
                await client.get_batch()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(waiting)
            tasks.start_soon(waiting)
            await until(daemon, lambda: [m for m, _ in daemon.seen].count("get_batch") == 2)
            client.close()


async def test_a_restart_in_the_loop_body_costs_nothing(tmp_path: Path) -> None:
    with stub_daemon(tmp_path, 4) as daemon:
        async with AsyncRolloutClient(daemon.path) as client:
            steps = []
            async for batch in client.batches(prefetch=True):
                steps.append(batch.step)
                if batch.step in (1, 2):
                    await anyio.to_thread.run_sync(daemon.stop)
                    daemon.start()
        assert steps == daemon.acked == [0, 1, 2, 3]


async def test_a_loop_that_was_left_gives_back_when_the_next_begins(tmp_path: Path) -> None:
    with stub_daemon(tmp_path, 3) as daemon:
        async with AsyncRolloutClient(daemon.path) as client:
            async for batch in client.batches(prefetch=True):
                if batch.step == 1:
                    break
            assert [batch.step async for batch in client.batches(prefetch=True)] == [1, 2]


async def test_errors_of_the_daemon_are_their_types(tmp_path: Path) -> None:
    def script(connection: StubConnection, request_id: int, method: str, _: dict[str, Any]) -> bool:
        code = {"ack": "lease_expired", "get_batch": "timeout"}.get(method)
        if code is not None:
            connection.error(request_id, code)
        return code is not None

    with stub_daemon(tmp_path, 1, script=script) as daemon:
        async with AsyncRolloutClient(daemon.path) as client:
            with pytest.raises(LeaseUnknown):
                await client.ack("x")
            with pytest.raises(BatchTimeout):
                await client.get_batch(0)
