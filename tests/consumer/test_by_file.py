"""Batches that are read from the daemon's files: the same bytes, or the same batch through the socket."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from orchestrator.client import AsyncRolloutClient, Batch, RolloutClient
from orchestrator.client import files as client_files
from orchestrator.client.files import Unreadable, located
from orchestrator.consumer.socket.connection import Answer, Connection
from orchestrator.consumer.socket.requests import Request
from orchestrator.consumer.socket.send_queue import SendQueue
from orchestrator.core.ledger.events import Launched, LeaseAcked
from orchestrator.core.ledger.groups import LocatedFrames, Place, StoredGroup
from orchestrator.frames import encode_frame
from orchestrator.state import StateStore
from orchestrator.state import readers as state_readers
from orchestrator.state.readers import MAX_OPEN, SegmentReaders
from orchestrator.state.segments import segment_path
from tests.campaigns.checks import until
from tests.support.builders import frame_for
from tests.support.consumer_server import Methods, serving
from tests.support.consumer_stub import StubConnection, StubDaemon, stub_daemon
from tests.support.daemon_process import daemon, write_config
from tests.support.state_histories import act, opened

# -- the client, at a stub ---------------------------------------------------------------------------------------------


def descriptors_of(pid: int | str = "self") -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def cut_in_two(payload: bytes) -> list[bytes]:
    """The frames of a payload of two."""
    _, header, body = struct.unpack_from("<4sIQ", payload)
    return [payload[: 16 + header + body], payload[16 + header + body :]]


def _open_in(folder: Path) -> list[str]:
    """What this process has open of a folder, itself included."""
    links = []
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the one of the listing itself
            links.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return [link for link in links if Path(link).is_relative_to(folder)]


def in_files(daemon: StubDaemon, folder: Path, *, gap: int = 24) -> Callable[[int], tuple[list[int], Any]]:
    """Each frame of a batch in a file of its own, after ``gap`` bytes of something else."""

    def files(step: int) -> tuple[list[int], Any]:
        descriptors, table = [], []
        for i, one in enumerate(cut_in_two(daemon.payloads[step])):
            path = folder / f"{step}-{i}"
            path.write_bytes(b"?" * gap + one + b"?" * 100)
            descriptors.append(os.open(path, os.O_RDONLY))
            table.append([i, gap, len(one)])
        return descriptors, table

    return files


def content(batch: Batch) -> list[bytes]:
    return [bytes(group.frame.buffer) for group in batch.groups]


def test_frames_are_read_from_files_and_no_descriptor_stays(tmp_path: Path) -> None:
    with stub_daemon(tmp_path, 3, length=5000) as stub, RolloutClient(stub.path) as client:
        stub.files = in_files(stub, tmp_path)
        for step in range(3):
            batch = client.get_batch(5)
            assert content(batch) == cut_in_two(stub.payloads[step])
            batch.groups[0].response_tokens[:] = 7  # memory of the client's own: the file is as it was
            assert b"".join(cut_in_two(stub.payloads[step])) == stub.payloads[step]
            client.ack(batch.lease)
        until(lambda: not _open_in(tmp_path), "all are closed")  # the stub closes its own a moment later
        assert (stub.acked, stub.given_back) == ([0, 1, 2], [])


def test_slices_of_a_long_frame_let_others_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_files, "READ_SLICE_BYTES", 1000)
    with stub_daemon(tmp_path, 1, length=5000) as stub, RolloutClient(stub.path) as client:
        stub.files = in_files(stub, tmp_path)
        assert content(client.get_batch(5)) == cut_in_two(stub.payloads[0])


def _folder(descriptors: list[int], table: Any, folder: Path) -> tuple[list[int], Any]:
    for descriptor in descriptors:
        os.close(descriptor)
    return [os.open(folder, os.O_RDONLY), os.open(folder, os.O_RDONLY)], table


def _missing(descriptors: list[int], table: Any, _: Path) -> tuple[list[int], Any]:
    for descriptor in descriptors:
        os.close(descriptor)
    return [], table


FAULTS: dict[str, Callable[[list[int], Any, Path], tuple[list[int], Any]]] = {
    "no descriptors came": _missing,
    "a folder": _folder,
    "beyond the end": lambda fds, table, _: (fds, [[0, 10**9, 10], table[1]]),
    "cut off": lambda fds, table, _: (fds, [table[0], [1, table[1][1], table[1][2] + 1000]]),
    "another file": lambda fds, table, _: (fds, [table[0], [2, 0, 10]]),
    "before the first file": lambda fds, table, _: (fds, [table[0], [-1, 0, 10]]),
    "before the file": lambda fds, table, _: (fds, [table[0], [1, -8, 10]]),
    "less than nothing": lambda fds, table, _: (fds, [table[0], [1, 0, -1]]),
    "too much": lambda fds, table, _: (fds, [table[0], [1, 0, 2 << 30]]),
    "beyond any file": lambda fds, table, _: (fds, [table[0], [1, 1 << 63, 10]]),
    "too much of what could be": lambda fds, table, _: (fds, [table[0], [1, 0, 1 << 80]]),
    "no list": lambda fds, _, __: (fds, {"0": 1}),
    "no integers": lambda fds, table, _: (fds, [table[0], [1, 0.5, 10]]),
    "two of three": lambda fds, table, _: (fds, [table[0], [1, 24]]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_read_comes_through_the_socket(tmp_path: Path, fault: str) -> None:
    with stub_daemon(tmp_path, 2) as stub, RolloutClient(stub.path) as client:
        good = in_files(stub, tmp_path)
        stub.files = lambda step: FAULTS[fault](*good(step), tmp_path)
        for step in range(2):
            batch = client.get_batch(5)
            assert batch.step == step
            assert content(batch) == cut_in_two(stub.payloads[step])
            client.ack(batch.lease)
        asked = [params.get("by_file", False) for method, params in stub.seen if method == "get_batch"]
        assert asked == [True, False, False], "once is enough to know"
        assert (stub.given_back, stub.acked) == ([0], [0, 1])
        until(lambda: not _open_in(tmp_path), "all are closed")  # the stub closes its own a moment later


def test_an_older_daemon_is_not_asked_for_files(tmp_path: Path) -> None:
    with stub_daemon(tmp_path, 2) as stub:
        stub.is_old = True
        with RolloutClient(stub.path) as client:
            for step in range(2):
                batch = client.get_batch(5)
                assert content(batch) == cut_in_two(stub.payloads[step])
                client.ack(batch.lease)


def test_no_memory_is_taken_for_more_than_is_allowed() -> None:
    assert located([[0, 0, 600], [0, 600, 400]], [3], 1000) == [(3, 0, 600), (3, 600, 400)]
    with pytest.raises(Unreadable, match="1000 are allowed"):
        located([[0, 0, 600], [0, 600, 401]], [3], 1000)


def test_a_batch_by_file_that_was_given_up_is_given_back_with_its_descriptors(tmp_path: Path) -> None:
    with stub_daemon(tmp_path, 1) as stub, RolloutClient(stub.path) as client:
        stub.files = in_files(stub, tmp_path)
        request = client.request_batch(5)
        stub.wait_until(lambda: stub.handed_out == [0])
        client.cancel(request)
        assert content(client.get_batch(5)) == cut_in_two(stub.payloads[0])
        assert stub.given_back == [0]
        until(lambda: not _open_in(tmp_path), "all are closed")  # the stub closes its own a moment later


@pytest.mark.parametrize("ends_by", ["closing", "giving up"])
def test_what_nobody_has_looked_at_is_closed(tmp_path: Path, ends_by: str) -> None:
    """An answer that another request's wait parked."""
    with stub_daemon(tmp_path, 1) as stub:
        with RolloutClient(stub.path) as client:
            stub.files = in_files(stub, tmp_path)
            request = client.request_batch(5)
            stub.wait_until(lambda: stub.handed_out == [0])
            client.status()
            assert len(_open_in(tmp_path)) >= 2
            if ends_by == "giving up":
                client.cancel(request)
                until(lambda: not _open_in(tmp_path), "all are closed")
                assert client.get_batch(5).step == 0
        until(lambda: not _open_in(tmp_path), "all are closed")


@pytest.mark.parametrize("of", ["status", "get_batch"])
def test_descriptors_that_nobody_asked_for_are_closed(tmp_path: Path, of: str) -> None:
    def script(connection: StubConnection, request_id: int, method: str, _: dict[str, Any]) -> bool:
        if method != of:
            return False
        descriptors = [os.open(tmp_path, os.O_RDONLY) for _ in range(3)]
        answer = encode_frame({"id": request_id, "result": {"frames": "no batch"}})
        if of == "get_batch":  # with its frames, in the usual way
            answer = connection.batch_answer(request_id, 0)
        for i in range(len(answer)):  # byte by byte: they come with the first one
            socket.send_fds(connection.sock, [answer[i : i + 1]], descriptors if i == 0 else [])
        for descriptor in descriptors:
            os.close(descriptor)
        return True

    with stub_daemon(tmp_path, 1, script=script) as stub, RolloutClient(stub.path) as client:
        for _ in range(3):
            client.status() if of == "status" else client.get_batch(5)
        client.close()
        until(lambda: not _open_in(tmp_path), "all are closed")


async def test_the_asynchronous_client_gives_back_what_it_was_reading_when_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_files, "READ_SLICE_BYTES", 1000)
    with stub_daemon(tmp_path, 1, length=5000) as stub:
        async with AsyncRolloutClient(stub.path) as client:
            good = in_files(stub, tmp_path)
            scope = anyio.CancelScope()

            def files(step: int) -> tuple[list[int], Any]:
                found = good(step)
                stub.files = good
                loop.call_soon_threadsafe(cancel_in_some_turns, 20)
                return found

            def cancel_in_some_turns(turns: int) -> None:
                if turns:
                    loop.call_soon(cancel_in_some_turns, turns - 1)
                else:
                    scope.cancel()

            loop = anyio.lowlevel.current_token().native_token
            stub.files = files
            with scope:
                await client.get_batch(5)
            assert scope.cancelled_caught
            assert content(await client.get_batch(5)) == cut_in_two(stub.payloads[0])
            assert stub.given_back == [0]
            until(lambda: not _open_in(tmp_path), "all are closed")  # the stub closes its own a moment later


# -- the daemon --------------------------------------------------------------------------------------------------------


class RawClient:
    """Asks for batches with nothing of ours."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(30)
        self.sock.connect(str(path))

    def ask(self, method: str, **params: Any) -> tuple[dict[str, Any], bytes, list[int]]:
        header = json.dumps({"id": 1, "method": method, "params": params}).encode()
        self.sock.sendall(struct.pack("<4sIQ", b"ROL1", len(header), 0) + header)
        first, descriptors, _, _ = socket.recv_fds(self.sock, 1, 64)
        prefix = first + self._read(15)
        _, header_bytes, payload_bytes = struct.unpack("<4sIQ", prefix)
        answer = json.loads(self._read(header_bytes))
        assert "error" not in answer, answer
        return answer["result"], self._read(payload_bytes), list(descriptors)

    def _read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            part = self.sock.recv(size - len(data))
            assert part, "the daemon closed the connection"
            data += part
        return bytes(data)

    def frames(self, *, by_file: bool) -> tuple[dict[str, Any], bytes]:
        """The next batch: its result without the table, and all its frames."""
        result, payload, descriptors = self.ask("get_batch", timeout_s=30, by_file=by_file)
        table = result.pop("frames", None)
        assert (table is not None) == by_file == bool(descriptors)
        if table is not None:
            assert payload == b""
            for descriptor in descriptors:
                assert not os.get_inheritable(descriptor) or descriptor > 2
                with pytest.raises(OSError):
                    os.write(descriptor, b"x")
            payload = b"".join(os.pread(descriptors[file], length, offset) for file, offset, length in table)
            for descriptor in descriptors:
                os.close(descriptor)
        return result, payload

    def close(self) -> None:
        self.sock.close()


def test_a_batch_is_the_same_by_file_and_through_the_socket_also_after_a_kill(tmp_path: Path) -> None:
    with daemon(write_config(tmp_path)) as process:
        process.connect().close()
        seen = []
        for turn in range(6):
            for by_file in (True, False) if turn % 2 else (False, True):
                client = RawClient(process.socket)
                seen.append(client.frames(by_file=by_file))
                client.close()
            assert seen[-1] == seen[-2]
            assert len(seen[-1][1]) > 1000
            with process.connect() as client:
                client.ack(seen[-1][0]["lease"])
            if turn == 2:
                client = RawClient(process.socket)
                before = client.frames(by_file=True)
                process.kill()
                client.close()
                process.start()
                process.connect().close()
                client = RawClient(process.socket)
                assert client.frames(by_file=True) == before
                client.close()


def test_descriptors_of_the_daemon_do_not_add_up(tmp_path: Path) -> None:
    with daemon(write_config(tmp_path)) as process, process.connect() as client:
        assert process.process is not None

        def some_batches() -> None:
            for _ in range(10):
                batch = client.get_batch(30)
                client.ack(batch.lease)
            request = client.request_batch(30)
            client.cancel(request)
            client.status()

        some_batches()
        before = descriptors_of(process.process.pid)
        for _ in range(4):
            some_batches()
        assert descriptors_of(process.process.pid) <= before + 3  # a segment more; a file that is just being synced


@contextmanager
def forwarding(folder: Path, to: Path) -> Iterator[Path]:
    """A socket that passes bytes on and nothing else, as a tunnel does."""
    path, sockets = folder / "tunnel", []
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen()

    def pump(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while part := source.recv(1 << 16):
                sink.sendall(part)
            sink.shutdown(socket.SHUT_WR)

    def accept() -> None:
        with suppress(OSError):
            while True:
                here = listener.accept()[0]
                there = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                there.connect(str(to))
                sockets.extend((here, there))
                for pair in ((here, there), (there, here)):
                    threads.append(threading.Thread(target=pump, args=pair))
                    threads[-1].start()

    threads = [threading.Thread(target=accept)]
    threads[0].start()
    try:
        yield path
    finally:
        for sock in (listener, *sockets):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        for thread in threads:
            thread.join(20)


def test_through_a_tunnel_batches_come_as_bytes(tmp_path: Path) -> None:
    config = write_config(tmp_path, rollout={"num_rollout": 5})
    with daemon(config) as process, forwarding(tmp_path, process.socket) as path:
        process.connect().close()
        with RolloutClient(path) as client:
            steps = [batch.step for batch in client.batches()]
            assert steps == [0, 1, 2, 3, 4]
            with pytest.raises(Exception, match="ended after 5"):
                client.get_batch(1)


@pytest.mark.parametrize("filled_by", ["the transport", "the kernel"])
async def test_descriptors_do_not_overtake_what_waits(tmp_path: Path, filled_by: str) -> None:
    here, there = socket.socketpair()
    here.setblocking(False)
    _, writer = await asyncio.open_unix_connection(sock=here)
    send_queue, descriptor = SendQueue(here, writer, lambda: False), os.open(tmp_path, os.O_RDONLY)
    size = 4 << 20
    if filled_by == "the transport":
        send_queue.send_last(bytes(size))
    else:
        size = 0
        with suppress(BlockingIOError):
            while True:
                size += here.send(bytes(1 << 16))
    assert not await send_queue.send_descriptors(b"head", [descriptor])
    while size:
        part, descriptors, _, _ = await anyio.to_thread.run_sync(socket.recv_fds, there, min(size, 1 << 16), 8)
        size -= len(part)
        assert not descriptors
        assert not any(part)
    assert await send_queue.send_descriptors(b"head", [descriptor])
    part, descriptors, _, _ = socket.recv_fds(there, 100, 8)
    assert part == b"head"
    assert os.fstat(descriptors[0]) == os.fstat(descriptor)
    there.close()
    assert not await send_queue.send_descriptors(b"head", [descriptor])
    writer.close()
    for each in (descriptor, *descriptors):
        os.close(each)


async def test_what_cannot_be_passed_on_goes_as_bytes_and_leaves_nothing_open(tmp_path: Path) -> None:
    """Something else is on its way: the answer is a batch all the same."""
    frame = _stored(0).frame

    async def get_batch(_: Connection, __: Request) -> Answer:
        descriptor = os.open(tmp_path / "frame", os.O_RDONLY)
        connections[0]._send_queue.send_last(bytes(ahead))
        return Answer({"groups": 1}, [frame], located=LocatedFrames([descriptor], [(0, 0, len(frame))]))

    def client(path: Path) -> None:
        raw = RawClient(path)
        raw.sock.sendall(encode_frame({"id": 1, "method": "get_batch", "params": {}}))
        assert raw._read(ahead) == bytes(ahead)
        _, header_bytes, payload_bytes = struct.unpack("<4sIQ", raw._read(16))
        assert json.loads(raw._read(header_bytes)) == {"id": 1, "result": {"groups": 1}}
        assert raw._read(payload_bytes) == frame
        raw.close()

    (tmp_path / "frame").write_bytes(frame)
    ahead, methods = 4 << 20, Methods(get_batch=get_batch)
    connections: list[Connection] = []
    methods.opened = connections.append  # type: ignore[method-assign]
    methods.closed = lambda _: None  # type: ignore[method-assign]
    async with serving(tmp_path, methods) as path:
        await anyio.to_thread.run_sync(client, path)
        assert not _open_in(tmp_path)


async def test_an_answer_that_cannot_list_its_frames_is_sent_with_them(tmp_path: Path) -> None:
    """A batch of tens of thousands of groups: the list is above the limit of a header, the batch is not."""
    frame, groups = _stored(0).frame, 60_000

    async def get_batch(_: Connection, __: Request) -> Answer:
        descriptor = os.open(tmp_path / "frame", os.O_RDONLY)
        table = [(0, 10**8 + i, len(frame)) for i in range(groups)]
        return Answer({"groups": 1}, [frame], located=LocatedFrames([descriptor], table))

    def client(path: Path) -> None:
        raw = RawClient(path)
        raw.sock.sendall(encode_frame({"id": 1, "method": "get_batch", "params": {}}))
        _, header_bytes, payload_bytes = struct.unpack("<4sIQ", raw._read(16))
        assert json.loads(raw._read(header_bytes)) == {"id": 1, "result": {"groups": 1}}
        assert raw._read(payload_bytes) == frame
        raw.close()

    (tmp_path / "frame").write_bytes(frame)
    async with serving(tmp_path, Methods(get_batch=get_batch)) as path:
        await anyio.to_thread.run_sync(client, path)
        assert not _open_in(tmp_path)


# -- the store ---------------------------------------------------------------------------------------------------------


def _stored(i: int) -> StoredGroup:
    launched = Launched("easy", i, 2 * i, 2, i, 0)
    return StoredGroup.from_frame(frame_for(launched), Place(0, 0, 0))


def _held(store: StateStore) -> list[StoredGroup]:
    ready = [group for state in store.ledger.sources.values() for group in state.ready.values()]
    leased = [g for batch in store.ledger.leases.batches.values() for share in batch.shares for g in share.groups]
    return ready + leased


def _read(found: LocatedFrames) -> list[bytes]:
    frames = [os.pread(found.descriptors[file], length, offset) for file, offset, length in found.table]
    for descriptor in found.descriptors:
        os.close(descriptor)
    return frames


@pytest.mark.parametrize("seed", range(6))
async def test_located_frames_are_those_that_are_held_at_any_moment(tmp_path: Path, seed: int) -> None:
    """Whatever is queued, written, moved, synced or removed: what is said to be in a file is there, all of it."""
    rng, counts = random.Random(seed), {"found": 0, "not now": 0}

    async def look() -> None:
        groups = rng.sample(held := _held(store), min(len(held), rng.randrange(1, 8)))
        found = await store.located(groups)
        counts["not now" if found is None else "found"] += 1
        if found is not None:
            assert _read(found) == [bytes(group.frame) for group in groups]

    async def look_often() -> None:
        while True:
            await look()
            await anyio.lowlevel.checkpoint()

    async with opened(tmp_path, segment_bytes=8192) as store, anyio.create_task_group() as tasks:
        for _ in range(30):
            act(store, rng)
        tasks.start_soon(look_often)
        for _ in range(60):
            for _ in range(rng.randrange(1, 30)):
                act(store, rng)
            if rng.random() < 0.4:
                await store.snapshot()
                await store.compact()
            await store.written()
            await look()
        tasks.cancel_scope.cancel()
    assert min(counts.values()) > 20, counts
    async with opened(tmp_path) as store:  # and what a restart has read back
        await look()


async def test_a_removed_segment_gives_its_space_back(tmp_path: Path) -> None:
    async with opened(tmp_path, segment_bytes=8192) as store:
        rng = random.Random(2)
        for _ in range(40):
            for _ in range(20):
                act(store, rng)
            await store.written()
            found = await store.located(_held(store)[:4])
            if found is not None:
                _read(found)
            await store.snapshot()
            await store.compact()
        assert len(store._readers.numbers) > 1
        for batch in list(store.ledger.leases.batches.values()):
            store.record(LeaseAcked(batch.step, 0))
        for _ in range(3):  # nobody asks where anything is meanwhile
            await store.snapshot()
            await store.compact()
        assert not [path for path in _open_in(tmp_path) if path.endswith("(deleted)")]


async def test_nothing_is_read_from_a_disk_with_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(tmp_path) as store:
        rng = random.Random(4)
        while not _held(store):
            act(store, rng)
        await store.written()
        groups = _held(store)[:2]
        found = await store.located(groups)
        assert found is not None
        assert len(_read(found)) == len(groups)
        monkeypatch.setattr(StateStore, "fault", property(lambda _: "the disk is on fire"))
        assert await store.located(groups) is None
        monkeypatch.undo()


async def test_a_segment_that_cannot_be_opened_is_no_failure(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        rng = random.Random(4)
        while not _held(store):
            act(store, rng)
        await store.written()
        for path in tmp_path.glob("log-*"):
            shutil.copy(path, tmp_path / "kept")
            path.unlink()
            assert await store.located(_held(store)[:1]) is None
            shutil.copy(tmp_path / "kept", path)


async def test_segments_that_are_asked_for_stay_open_when_others_are_opened(tmp_path: Path) -> None:
    for number in range(MAX_OPEN + 20):
        segment_path(tmp_path, number).touch()
    readers = SegmentReaders(tmp_path)
    assert await readers.open(range(20))
    assert await readers.open(range(20, MAX_OPEN))
    assert await readers.open([*range(20), *range(MAX_OPEN, MAX_OPEN + 12)])
    assert len(readers.numbers) == MAX_OPEN
    readers.close()
    assert not _open_in(tmp_path)


async def test_a_disk_that_hangs_holds_one_thread_for_a_segment_and_no_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(segment_path(tmp_path, 1))  # opened for reading, it waits for a writer
    segment_path(tmp_path, 2).touch()
    monkeypatch.setattr(state_readers, "OPEN_PATIENCE_S", 0.01)
    readers = SegmentReaders(tmp_path)
    with anyio.fail_after(20):
        for _ in range(100):  # as many threads would be more than there are
            assert not await readers.open([1, 2])
        assert readers.are_open([2])
        writing = await anyio.to_thread.run_sync(os.open, segment_path(tmp_path, 1), os.O_WRONLY)
        monkeypatch.undo()
        assert await readers.open([1, 2])
    os.close(writing)
    readers.close()
    assert not _open_in(tmp_path)
