"""The hard server as trainers meet it: real daemons, requests in vain, full disks, unread batches, crowded sockets."""

from __future__ import annotations

import os
import resource
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import BadRequest, BadWorldSize, LeaseUnknown, NotWritten, RankInUse
from orchestrator.frames import encode_frame
from tests.campaigns.checks import until
from tests.support.daemon_process import DaemonProcess, daemon, write_config, write_prompts
from tests.support.impatient_daemon import impatient_daemon
from tests.torture.frames import kept, settled


def test_wrong_parameters_touch_nothing(tmp_path: Path) -> None:
    with daemon(write_config(tmp_path)) as process, process.connect() as client:
        lease = client.get_batch(timeout_s=30).lease
        before = settled(client)
        with pytest.raises(BadRequest, match="cannot be the name"):
            client.save("../up", trained_through=0)
        for alias in (lease.replace(".0.0", ".00.0"), lease[:-1] + "٠", lease + "\n", lease.upper() + ".0"):
            with pytest.raises(LeaseUnknown):
                client.ack(alias)
            with pytest.raises(LeaseUnknown):
                client.nack(alias, discard=True)
        with process.connect(rank=2, world_size=3) as other, pytest.raises(BadWorldSize):
            other.get_batch(timeout_s=0)
        assert kept(settled(client)) == kept(before)


def test_a_world_size_that_cannot_be_drops_no_stale_group_and_takes_no_rank(tmp_path: Path) -> None:
    config = write_config(tmp_path, rollout={"max_staleness": 0})
    with daemon(config) as process, process.connect() as client:
        settled(client)
        client.set_policy_version(5)
        before = settled(client)
        with process.connect(rank=0, world_size=3) as other:
            with pytest.raises(BadWorldSize, match="4 groups"):
                other.get_batch(timeout_s=0)
            assert kept(settled(client)) == kept(before)
            assert client.get_batch(timeout_s=30).step == 0  # the rank is free
            with pytest.raises(BadWorldSize, match="all ranks"):
                other.get_batch(timeout_s=0)


def test_who_is_displaced_is_told_by_whom(tmp_path: Path) -> None:
    with daemon(write_config(tmp_path)) as process, process.connect(takeover=True) as client:
        for _ in range(2):
            client.get_batch(30)
        third = client.request_batch(60)  # waits for an acknowledgement
        with process.connect() as successor:
            successor.hello(takeover=True)
            with pytest.raises(RankInUse, match=f"taken over by process {os.getpid()}"):
                client.receive_batch(third)
            assert successor.get_batch(30).step == 0


def test_a_trainer_comes_in_where_only_silent_ones_are(tmp_path: Path) -> None:
    """It is not closed for others either, however long it works on its batch, and whatever these have asked."""
    with daemon(write_config(tmp_path, consumer={"max_connections": 20})) as process, ExitStack() as stack:
        process.connect().close()

        def crowd() -> None:
            for _ in range(30):
                idle = stack.enter_context(socket.socket(socket.AF_UNIX))
                idle.connect(str(process.socket))
                idle.sendall(asks)

        asks = b""
        crowd()
        with process.connect() as client:
            lease = client.get_batch(timeout_s=30).lease
            asks = encode_frame({"id": 1, "method": "hello", "params": {}})
            crowd()
            with process.connect(rank=0) as other, pytest.raises(RankInUse):
                other.get_batch(timeout_s=0)
            client.ack(lease)
            assert 18 <= len(client.status()["connections"]) <= 20
        assert process.stop() == 0
        assert any("for a new one" in line["message"] for line in process.log)


def test_a_trainer_that_does_not_read_its_batch_loses_it_to_one_that_does(tmp_path: Path) -> None:
    write_prompts(tmp_path / "easy.jsonl", 20, text="x" * 60_000)
    config = write_config(tmp_path, rollout={"rollout_batch_size": 8}, data_source_weights=[1, 0])
    with impatient_daemon(config, socket__send_queue__SEND_STALL_S=1.0) as process, process.connect() as client:
        with socket.socket(socket.AF_UNIX) as deaf:
            deaf.connect(str(process.socket))
            deaf.sendall(encode_frame({"id": 1, "method": "get_batch", "params": {}}))
            lease = until(lambda: client.status()["leases"], "a lease")[0]["lease"]

            def take() -> Any:
                try:
                    return client.get_batch(timeout_s=30)
                except RankInUse:
                    return None

            batch = until(take, "the batch")
            assert batch.lease == lease
            client.ack(batch.lease)
        process.wait_for_line("was disconnected")


def spoil_disk(process: DaemonProcess) -> tuple[int, int]:
    assert process.process is not None
    limits = resource.prlimit(process.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(process.process.pid, resource.RLIMIT_FSIZE, (1, limits[1]))
    return limits


def mend_disk(process: DaemonProcess, limits: tuple[int, int]) -> None:
    assert process.process is not None
    resource.prlimit(process.process.pid, resource.RLIMIT_FSIZE, limits)


def test_a_disk_that_fails_is_an_answer_that_says_what_is_known(tmp_path: Path) -> None:
    constants = {"writing__WRITE_DEADLINE_S": 0.5, "methods__checkpoints__SAVE_DEADLINE_S": 1.0}
    with impatient_daemon(write_config(tmp_path), **constants) as process, process.connect() as client:
        client.save("before")
        lease = client.get_batch(timeout_s=30).lease
        limits = spoil_disk(process)
        with pytest.raises(NotWritten, match="counts as trained on, but was not written to disk"):
            client.ack(lease)
        with pytest.raises(NotWritten, match="policy version 3 is in force"):
            client.set_policy_version(3)
        with pytest.raises(NotWritten, match="the weight of easy is set"):
            client.set_weight("easy", 0.5)
        with pytest.raises(NotWritten, match="hard is paused"):
            client.pause("hard")
        with pytest.raises(NotWritten, match="'after' was not saved"):
            client.save("after")
        status = client.status()
        assert (status["policy_version"], status["leases"]) == (3, [])
        mend_disk(process, limits)

        def is_acknowledged() -> bool:
            try:
                client.ack(lease)
            except NotWritten:  # the next try of a disk that failed may be later than the answer has to be
                return False
            return True

        until(is_acknowledged, "the disk is noticed to be mended")
        client.set_policy_version(3)
        assert [fact["name"] for fact in client.checkpoints()] == ["before"]
        client.save("after")
        process.kill()
        process.start()
        with process.connect() as again:
            status = again.status()
            assert (status["policy_version"], status["leases"]) == (3, [])
            assert status["sources"]["hard"]["paused"]


def test_the_loop_waits_for_a_disk_that_comes_back(tmp_path: Path) -> None:
    said: list[str] = []
    spoiled: list[tuple[int, int]] = []
    with impatient_daemon(write_config(tmp_path), writing__WRITE_DEADLINE_S=0.3) as process:

        def on_wait(cause: dict[str, Any]) -> None:
            said.append(cause["sentence"])
            while spoiled:
                mend_disk(process, spoiled.pop())

        steps = []
        with process.connect() as client:
            for batch in client.batches(on_wait=on_wait, reconnect_s=30):
                steps.append(batch.step)
                if batch.step == 1:
                    spoiled.append(spoil_disk(process))
                if batch.step == 3:
                    break
    assert steps == [0, 1, 2, 3]
    assert any("was not written to disk" in sentence for sentence in said)


def test_client_names_stay_short_and_printable(tmp_path: Path) -> None:
    name = "\x00\n" + "é" * 500
    with daemon(write_config(tmp_path)) as process, process.connect() as first, process.connect(client=name):
        names = [entry["client"] for entry in first.status()["connections"]]
    assert "??" + "é" * 78 in names
