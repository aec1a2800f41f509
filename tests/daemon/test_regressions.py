"""Defects that were found once, each with the story of how it broke."""

from __future__ import annotations

import os
import resource
import socket
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import aiofiles.os
import anyio
import pytest

from orchestrator.consumer.handout import Handout
from orchestrator.core.ledger.events import VersionSet, encode_event
from orchestrator.core.ledger.ledger import SourceSize
from orchestrator.core.ledger.partials import encode_partial, restore_samples
from orchestrator.errors import BatchTimeout
from orchestrator.frames import encode_frame
from orchestrator.state import StateStore
from orchestrator.state import appender as log_writer
from orchestrator.state.segments import RecordKind, encode_prefix, segment_path
from orchestrator.state.writer import LogWriter
from tests.consumer.test_handout import A, B, Setup, indices
from tests.support.builders import make_sample
from tests.support.daemon_process import daemon, write_config, write_prompts

pytestmark = pytest.mark.timeout(60)


def put_reward(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> str:
    """A module with a reward function that the daemon finds; returns its dotted path."""
    (folder / "own_reward.py").write_text(f"import time\n\n\ndef score(*_, **__):\n    {body}\n")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return "own_reward.score"


def source(name: str, reward: Any = "contains", **prompts: Any) -> dict[str, Any]:
    return {"name": name, "prompts": {"path": f"{name}.jsonl", **prompts}, "reward": reward}


def test_an_error_that_quotes_a_whole_request_is_an_answer(tmp_path: Path) -> None:
    """The answer was longer than a header may be, and the error of encoding it ended the daemon."""
    with daemon(write_config(tmp_path)) as process, process.connect() as client:
        with socket.socket(socket.AF_UNIX) as raw:
            raw.settimeout(20)
            raw.connect(str(process.socket))
            name = "\n" * 500_000  # 1 MB as JSON, 1.5 MB once the message quotes it
            raw.sendall(encode_frame({"id": 1, "method": "pause", "params": {"source": name}}))
            assert b'"unknown_source"' in raw.recv(1 << 16)
        assert client.status()["step"] == 0


def test_a_shortage_of_descriptors_delays_connections_and_ends_nothing(tmp_path: Path) -> None:
    """Accepting ended the daemon, and so did a status, which counted the log's files on the disk."""
    with daemon(write_config(tmp_path)) as process, process.connect() as client:
        client.ack(client.get_batch(timeout_s=30).lease)
        assert process.process is not None
        pid = process.process.pid
        soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (len(os.listdir(f"/proc/{pid}/fd")), hard))
        with ExitStack() as stack:
            raws = []
            while not any("cannot accept" in line["message"] for line in process.log):
                if len(raws) < 16:  # more than what was open for a moment when descriptors were counted
                    raws.append(stack.enter_context(socket.socket(socket.AF_UNIX)))
                    raws[-1].settimeout(20)
                    raws[-1].connect(str(process.socket))
                    raws[-1].sendall(encode_frame({"id": 1, "method": "hello", "params": {}}))
                assert client.status()["step"] == 1
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
            for raw in raws:
                assert b'"rollout-orchestrator"' in raw.recv(1 << 16)


def test_a_source_whose_last_group_finishes_wakes_those_that_stand_in(tmp_path: Path, monkeypatch: Any) -> None:
    """The plan changed without anybody being woken: a batch waited for ever, with nothing in flight."""
    write_prompts(tmp_path / "easy.jsonl", 1)
    slow = put_reward(tmp_path, monkeypatch, "time.sleep(1); return 1.0")
    sources = [source("easy", slow, epochs=1), source("hard")]
    config = write_config(tmp_path, rollout={"lookahead": 1}, data_sources=sources, data_source_weights=[1, 1])
    with daemon(config) as process, process.connect() as client:
        assert client.get_batch(timeout_s=30).counts == {"easy": 1, "hard": 3}


def test_a_group_that_no_frame_can_hold_is_dropped_and_named(tmp_path: Path, monkeypatch: Any) -> None:
    """Each detail is within its limit, all of a group together are not: that ended the daemon, at every start."""
    wordy = put_reward(tmp_path, monkeypatch, "return {'r': 1.0, 'why': 'x' * 16_000}")
    sources = [source("easy", {"path": wordy, "key": "r"})]
    config = write_config(tmp_path, rollout={"n_samples_per_prompt": 70}, data_sources=sources, data_source_weights=[1])
    with daemon(config) as process, process.connect() as client:
        status = client.status()
        while not status["sources"]["easy"]["groups"]["dropped"]:
            with pytest.raises(BatchTimeout):
                client.get_batch(timeout_s=0.5)
            status = client.status()
        assert list(status["sources"]["easy"]["dropped"]) == ["too_large"]
        assert "less metadata" in status["cause"]["sentence"]


def test_drain_while_the_engines_are_probed_for_the_first_time(tmp_path: Path) -> None:
    """The socket is there before the producers are; cancelled before they began, they ended the daemon."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        engine = {"kind": "llamacpp", "url": f"http://127.0.0.1:{silent.getsockname()[1]}"}
        with daemon(write_config(tmp_path, engines=[engine])) as process:
            with process.connect() as client:
                client.drain()
                assert client.status()["generation"]["draining"]
            assert process.stop() == 0


def test_a_share_that_was_taken_over_is_not_freed_by_its_former_holder() -> None:
    """The answer that never left freed the share of the one who took over: it got the same batch twice."""
    setup = Setup()
    setup.finish("easy", 4)
    setup.finish("hard", 4)
    unsent = setup.take(A)
    assert setup.handouts.take_rank(B, 0, takeover=True) == A
    taken = setup.take(B)
    assert indices(taken) == indices(unsent)
    setup.handouts.release(unsent)
    assert setup.handouts.held == {taken.lease: B}
    second = setup.take(B)
    assert isinstance(second, Handout)
    assert not set(indices(second)) & set(indices(taken))


def test_a_disk_that_fails_is_named_with_the_deadline_that_was_asked_for(tmp_path: Path) -> None:
    """It said "within 0 s": the difference of two deadlines."""
    with daemon(write_config(tmp_path)) as process, process.connect() as client:
        client.ack(client.get_batch(timeout_s=30).lease)
        assert process.process is not None
        limits = resource.prlimit(process.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(process.process.pid, resource.RLIMIT_FSIZE, (1, limits[1]))
        with pytest.raises(BatchTimeout, match=r"within 5\.5 s: the state cannot be written: .*File too large"):
            client.get_batch(timeout_s=5.5)
        resource.prlimit(process.process.pid, resource.RLIMIT_FSIZE, limits)
        assert client.get_batch(timeout_s=30).step == 1


def test_a_long_text_is_parked() -> None:
    """A finished sample of a long context could not be parked: its text did not fit into a header."""
    sample = make_sample(7, length=5)
    sample.text = "é" * (600 << 10)
    (restored, _) = restore_samples(7, 2, [encode_partial(source="a", group_index=1, slot=0, sample=sample, start=0)])
    assert restored == sample


async def test_a_record_that_does_not_fit_is_cut_off_with_its_prefix(tmp_path: Path) -> None:
    """The prefix stayed behind: the next replay stopped at it and set aside all that was written since."""
    sizes = {"easy": SourceSize(10)}
    store = await StateStore.open(tmp_path, sizes)
    store.record(VersionSet(5))
    await store.aclose()
    for snapshot in tmp_path.glob("snapshot-*"):
        snapshot.unlink()
    unfit = encode_event(VersionSet(3))
    with segment_path(tmp_path, 1).open("ab") as file:
        file.write(encode_prefix(RecordKind.EVENT, unfit) + unfit + bytes(-len(unfit) % 8))
    for version, problems in ((5, 1), (6, 0), (7, 0)):
        store = await StateStore.open(tmp_path, sizes)
        assert (store.ledger.policy_version, len(store.recovery.problems)) == (version, problems)
        store.record(VersionSet(version + 1))
        await store.aclose()
        for snapshot in tmp_path.glob("snapshot-*.json"):
            snapshot.unlink()


async def test_flushing_goes_on_after_a_cancelled_close(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The descriptor was closed and still used: what was parked at the stop could not be written any more."""
    closing, go_on = threading.Event(), threading.Event()

    def held_up(fd: int) -> None:
        os.close(fd)
        closing.set()
        go_on.wait(20)

    monkeypatch.setattr(log_writer, "_close", aiofiles.os.wrap(held_up))
    writer = LogWriter(tmp_path, 1, segment_bytes=64)
    async with anyio.create_task_group() as tasks:
        go_on.set()
        await tasks.start(writer.run)
        await writer.written()
        closing.clear()
        go_on.clear()
        writer.append(RecordKind.EVENT, b"x" * 40)
        await writer.written()
        writer.append(RecordKind.EVENT, b"y" * 40)
        assert await anyio.to_thread.run_sync(closing.wait, 20)
        tasks.cancel_scope.cancel()
    go_on.set()
    with anyio.fail_after(10):
        await writer.flush()
    await writer.aclose()
    assert b"y" * 40 in segment_path(tmp_path, 2).read_bytes()
