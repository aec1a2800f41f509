"""One connection of the consumer API: deadlines, bounds, and clients that do not read; real sockets in one process."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path

import anyio
import pytest
from structlog.testing import capture_logs

from orchestrator.consumer.socket import connection as consumer_connection
from orchestrator.consumer.socket import send_queue, server
from orchestrator.consumer.socket.connection import MAX_PENDING_REQUESTS, READER_LIMIT_BYTES, Answer, Connection
from orchestrator.consumer.socket.requests import Request
from orchestrator.errors import OrchestratorError
from orchestrator.frames import MAGIC, MAX_HEADER_BYTES, PREFIX_BYTES, encode_frame
from tests.support.consumer_server import Line, Methods, dial, echo, for_ever, serving, until
from tests.support.hostile_frames import PREFIX

LARGE = b"x" * (4 << 20)
"""Far more than socket and transport hold."""


async def large(_: Connection, __: Request) -> Answer:
    return Answer({}, [LARGE], lease="a")


# -- frames ------------------------------------------------------------------------------------------------------------


async def test_a_frame_that_is_not_finished_in_time_ends_its_connection_and_silence_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumer_connection, "FRAME_DEADLINE_S", 0.2)
    service = Methods(wait=for_ever)
    frame = encode_frame({"id": 1, "method": "echo", "params": {}})
    async with serving(tmp_path, service) as path, dial(path) as silent, dial(path) as waiting:
        assert await silent.ask("echo", a=1) == {"a": 1}
        await waiting.send("wait")
        for part in (frame[:1], frame[:PREFIX_BYTES], frame[:-1]):
            async with dial(path) as slow:
                await slow.stream.send(part)
                header = await slow.header()
                assert (header["id"], header["error"]["code"]) == (None, "bad_frame")
                assert "not completed" in header["error"]["message"]
                assert await slow.rest() == b""
        assert await silent.ask("echo", a=2) == {"a": 2}
        assert await waiting.ask("echo", 2) == {}
        assert len(service.connections) == 2


async def test_a_byte_at_a_time_is_no_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consumer_connection, "FRAME_DEADLINE_S", 0.3)
    async with serving(tmp_path, Methods()) as path, dial(path) as slow, anyio.create_task_group() as tasks:

        async def drip() -> None:
            with suppress(anyio.BrokenResourceError):  # the server may have closed before the answer is read
                for i in range(10_000):
                    await slow.stream.send(
                        LARGE[i : i + 1] if i >= PREFIX_BYTES else PREFIX.pack(MAGIC, 9_000, 0)[i : i + 1]
                    )
                    await anyio.sleep(0.02)

        tasks.start_soon(drip)
        assert await slow.answer() == "bad_frame"
        tasks.cancel_scope.cancel()


@pytest.mark.parametrize(
    "prefix",
    [
        PREFIX.pack(b"ROL2", 8, 0),
        PREFIX.pack(MAGIC, MAX_HEADER_BYTES + 1, 0),
        PREFIX.pack(MAGIC, 2**32 - 1, 0),
        PREFIX.pack(MAGIC, 8, 1),
        PREFIX.pack(MAGIC, 0, 2**64 - 1),
        PREFIX.pack(MAGIC, 2, 0) + b"[]",
    ],
)
async def test_a_malformed_frame_ends_its_own_connection_alone(
    tmp_path: Path, prefix: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lengths alone are enough to be refused: nothing of what they announce is waited for."""
    monkeypatch.setattr(consumer_connection, "FRAME_DEADLINE_S", 1000.0)
    async with serving(tmp_path, Methods(wait=for_ever)) as path, dial(path) as other, dial(path) as bad:
        await bad.send("wait", 7)
        await bad.stream.send(prefix)
        assert await bad.answer() == "bad_frame"
        assert await bad.rest() == b""
        assert await other.ask("echo", a=1) == {"a": 1}


async def test_few_long_headers_are_received_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_LONG_HEADERS", 1)
    come: list[int] = []

    async def note(_: Connection, request: Request) -> Answer:
        come.append(request.id)
        return Answer({})

    service = Methods(note=note)
    first_frame, second_frame = (
        encode_frame({"id": i, "method": "note", "params": {"a": "x" * 2 * READER_LIMIT_BYTES}}) for i in (1, 2)
    )
    async with serving(tmp_path, service) as path, dial(path) as first, dial(path) as second, dial(path) as third:
        await first.stream.send(first_frame[:-8])
        assert await third.ask("echo") == {}
        await second.stream.send(second_frame)
        for _ in range(50):
            assert await third.ask("echo") == {}
        assert come == []
        await first.stream.send(first_frame[-8:])
        assert (await first.answer(), await second.answer()) == ({}, {})
        assert come == [1, 2]


# -- requests ----------------------------------------------------------------------------------------------------------


async def test_pending_requests_are_bounded_and_have_ids_of_their_own(tmp_path: Path) -> None:
    async with serving(tmp_path, Methods(wait=for_ever)) as path, dial(path) as line:
        for i in range(MAX_PENDING_REQUESTS - 1):
            await line.send("wait", i)
        assert await line.ask("wait", 0) == "bad_request"
        await line.send("wait", 1000)
        assert await line.ask("wait", 1001) == "bad_request"


async def test_a_request_that_is_given_up_is_answered_and_its_id_is_free(tmp_path: Path) -> None:
    async with serving(tmp_path, Methods(wait=for_ever)) as path, dial(path) as line:
        await line.send("wait", 1)
        await line.send("cancel", 2, id=1)
        headers = [await line.header(), await line.header()]
        assert sorted(h["error"]["code"] if "error" in h else str(h["result"]) for h in headers) == [
            "cancelled",
            "{'cancelled': True}",
        ]
        assert await line.ask("cancel", 2, id=1) == {"cancelled": False}
        assert await line.ask("echo", 1) == {}


async def test_a_defect_is_answered_and_logged_and_ends_nothing(tmp_path: Path) -> None:
    async def defect(*_: object) -> Answer:
        raise ZeroDivisionError

    async def disk(*_: object) -> Answer:
        raise PermissionError(13, "Permission denied", b"\xff")

    with capture_logs() as lines:
        async with serving(tmp_path, Methods(defect=defect, disk=disk)) as path, dial(path) as line:
            assert await line.ask("defect") == "internal"
            assert await line.ask("disk") == "state_error"
            assert await line.ask("echo") == {}
    [logged] = [entry for entry in lines if entry["log_level"] == "error"]
    assert "'defect'" in logged["event"]
    assert logged["exc_info"]


async def test_an_answer_that_cannot_be_said_is_undone_and_an_error(tmp_path: Path) -> None:
    undone = []

    async def too_much(*_: object) -> Answer:
        return Answer({"a": "x" * MAX_HEADER_BYTES}, undo=lambda: undone.append(1))

    async def wordy(*_: object) -> Answer:
        raise OrchestratorError("\udcff" * 9_000, data={"a": "x" * MAX_HEADER_BYTES})

    async with serving(tmp_path, Methods(too_much=too_much, wordy=wordy)) as path, dial(path) as line:
        assert await line.ask("too_much") == "bad_frame"
        assert undone == [1]
        assert await line.ask("wordy") == "internal"
        assert await line.ask("echo") == {}


# -- answers -----------------------------------------------------------------------------------------------------------


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def test_a_client_that_does_not_read_is_cut_off_and_stalls_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(send_queue, "SEND_STALL_S", 0.3)
    service = Methods(large=large)
    with capture_logs() as lines:
        async with serving(tmp_path, service) as path, dial(path) as other, dial(path) as deaf:
            assert await other.ask("echo") == {}
            before = descriptors()
            await deaf.send("large", 1)
            await deaf.send("echo", 2)
            await until(lambda: any(c.is_waiting for c in service.connections.values()))
            assert await other.ask("echo", a=1) == {"a": 1}
            await until(lambda: len(service.connections) == 1)
            await until(lambda: descriptors() < before)  # although the client keeps its end open
            assert await other.ask("echo", a=2) == {"a": 2}
    assert any("was disconnected" in entry["event"] for entry in lines if entry["log_level"] == "warning")


async def test_a_client_that_reads_slowly_makes_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its batch takes several times as long as a stall may."""
    monkeypatch.setattr(send_queue, "SEND_STALL_S", 0.3)
    async with serving(tmp_path, Methods(large=large)) as path, dial(path) as client:
        slow, began = Line(client.stream, pause_s=0.02), anyio.current_time()
        assert await slow.ask("large") == {}
        assert anyio.current_time() - began > 3 * 0.3
        assert await slow.ask("echo", a=1) == {"a": 1}


async def test_a_client_at_work_may_leave_its_next_batch_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(send_queue, "SEND_STALL_S", 0.1)
    service = Methods(large=large)
    async with serving(tmp_path, service) as path, dial(path) as line:
        assert await line.ask("echo") == {}
        [connection] = service.connections.values()
        service.at_work.add(connection)
        await line.send("large", 7)
        await anyio.sleep(0.5)
        assert await line.answer() == {}
        await until(lambda: connection.delivered == {"a"})
        await line.send("large", 7)
        service.at_work.clear()
        await until(lambda: not service.connections)


async def test_the_error_that_ends_a_connection_is_not_waited_for_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that sends garbage and reads nothing keeps no descriptor."""
    monkeypatch.setattr(consumer_connection, "LINGER_S", 0.1)
    service = Methods(large=large)
    async with serving(tmp_path, service) as path, dial(path) as deaf:
        assert await deaf.ask("echo") == {}
        before = descriptors()
        await deaf.send("large")
        await deaf.stream.send(b"garbage of more than sixteen bytes")
        await until(lambda: descriptors() < before)


async def test_half_a_connection_is_none(tmp_path: Path) -> None:
    service = Methods(wait=for_ever, echo=echo)
    async with serving(tmp_path, service) as path, dial(path) as line:
        await line.send("wait")
        await until(lambda: service.connections)
        line.socket.shutdown(socket.SHUT_WR)
        assert await line.rest() == b""
        assert not service.connections
