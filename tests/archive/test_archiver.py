"""The archive has each acknowledged batch once, as the trainer got it, whatever happens to the daemon and its disk."""

from __future__ import annotations

import os
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pyarrow.parquet as pq
import pytest
import structlog
from structlog.testing import LogCapture

from orchestrator.archive import Archiver, find_step, list_steps, read_groups, read_samples
from orchestrator.archive import archiver as archiver_module
from orchestrator.client import Batch, RolloutClient
from orchestrator.concurrency.broadcast import Broadcast
from orchestrator.core.ledger.events import BatchFormed, Event, LeaseAcked, LeaseDiscarded
from orchestrator.core.ledger.ledger import Ledger, SourceSize
from orchestrator.errors import ArchiveError
from tests.support.builders import MemoryJournal, frame_for, launch
from tests.support.daemon_process import DaemonProcess, daemon, write_config

pytestmark = pytest.mark.timeout(120)


def facts(batch: Batch) -> list[dict[str, Any]]:
    """What the trainer sees of a batch, as the archive says it."""
    return [
        {
            "source": group.source,
            "group_index": group.group_index,
            "prompt_index": group.prompt_index,
            "prompt": group.prompt,
            "label": group.label,
            "samples": [
                {
                    "index": sample.index,
                    "status": sample.status.value,
                    "reward": sample.reward,
                    "versions": sample.versions,
                    "tokens": len(sample.response_tokens),
                    "response": sample.text,
                }
                for sample in group.samples
            ],
        }
        for group in sorted(batch.groups, key=lambda group: group.group_index)
    ]


def as_facts(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    samples = ("index", "status", "reward", "versions", "tokens", "response")
    keys = ("source", "group_index", "prompt_index", "prompt", "label")
    return [
        {key: group[key] for key in keys} | {"samples": [{k: s[k] for k in samples} for s in group["samples"]]}
        for group in groups
    ]


def archived(directory: Path) -> dict[int, list[dict[str, Any]]]:
    """The groups of each step; every step has one file."""
    files = list_steps(directory)
    found = {file.step: as_facts(list(read_groups(file))) for file in files}
    assert len(found) == len(files), "a step has two files"
    return found


def train(client: RolloutClient, count: int) -> dict[int, list[dict[str, Any]]]:
    """Take and acknowledge batches; what was in them, by step."""
    seen = {}
    for _ in range(count):
        batch = client.get_batch(timeout_s=30)
        seen[batch.step] = facts(batch)
        client.ack(batch.lease)
    return seen


def wait_until_archived(client: RolloutClient) -> dict[str, Any]:
    while (status := client.status()["archive"])["waiting"]:
        assert status["fault"] is None
    return status


# -- with a real daemon -----------------------------------------------------------------------------------------------


def test_what_was_acknowledged_is_in_the_archive_as_the_trainer_got_it(tmp_path: Path) -> None:
    config = write_config(tmp_path, archive={"path": "kept"})
    with daemon(config) as process:
        with process.connect() as client:
            client.set_policy_version(3)
            seen = train(client, 4)
            held = client.get_batch(timeout_s=30)
            status = wait_until_archived(client)
            assert (status["written"], status["given_up"], status["newest_step"]) == (4, 0, 3)
            assert client.status()["run"]["has_archive"]
        assert archived(tmp_path / "kept") == seen, "and nothing of what is not acknowledged"
        assert held.step not in seen
        assert process.stop() == 0
    group = next(read_groups(find_step(tmp_path / "kept", 1)[0]))
    assert (group["step"], group["weight"]) == (1, pytest.approx({"easy": 0.7, "hard": 0.3}[group["source"]]))
    assert group["sampling"]["max_new_tokens"] == 8
    assert not [name for name in os.listdir(tmp_path / "kept") if name.endswith(".unfinished")]


def test_killed_again_and_again_each_acknowledged_batch_has_one_file(tmp_path: Path) -> None:
    config = write_config(tmp_path, archive={"path": "kept"})
    seen: dict[int, list[dict[str, Any]]] = {}
    with daemon(config) as process:
        for life in range(3):
            with process.connect() as client:
                seen |= train(client, 3 + life)
                if life == 1:  # between the batch and its acknowledgement, too
                    client.get_batch(timeout_s=30)
                process.kill()  # at once: what was acknowledged just now is hardly written
            process.start()
        with process.connect() as client:
            seen |= train(client, 1)
            wait_until_archived(client)
            assert client.status()["step"] == len(seen)
        assert archived(tmp_path / "kept") == seen


def test_a_disk_that_fails_keeps_no_trainer_waiting_and_costs_nothing_once_it_works(tmp_path: Path) -> None:
    (tmp_path / "kept").symlink_to("nowhere/kept")  # a disk that is not mounted
    config = write_config(tmp_path, archive={"path": "kept"})
    with daemon(config) as process:
        seen = _train_while_it_fails(process)
        with process.connect() as client:
            seen |= train(client, 2)
            while client.status()["archive"]["fault"] is None:
                pass
            (tmp_path / "kept").unlink()
            while client.status()["archive"]["waiting"]:
                pass
            assert client.status()["archive"]["fault"] is None
            assert archived(tmp_path / "kept") == seen
            (tmp_path / "kept").rename(tmp_path / "away")
            (tmp_path / "kept").symlink_to("nowhere/kept")
            train(client, 2)
            while len(levels := _archive_levels(process)) < 3:
                pass
            process.kill()
        assert levels[:3] == ["error", "error", "info"], "said once a life, not at every try"
        write_config(tmp_path, archive=None)  # what waits is given up with a warning
        process.start()
        with process.connect() as client:
            assert client.status()["archive"] is None
            train(client, 1)
        process.wait_for_line("were waiting for the archive")
        assert process.stop() == 0


def _archive_levels(process: DaemonProcess) -> list[str]:
    return [line["log.level"] for line in process.log if line["event"]["dataset"] == "archive"]


def _train_while_it_fails(process: DaemonProcess) -> dict[int, list[dict[str, Any]]]:
    with process.connect() as client:
        seen = train(client, 3)
        while (status := client.status()["archive"])["fault"] is None:
            pass
        assert "kept: File exists" in status["fault"]
        assert (status["written"], status["waiting"]) == (0, 3)
        assert status["waiting_bytes"] > 0
        process.wait_for_line("cannot write the archive")
        process.kill()
    process.start()
    return seen


def test_only_the_newest_are_kept_and_a_step_that_comes_again_has_a_file_of_its_own(tmp_path: Path) -> None:
    config = write_config(tmp_path, archive={"path": "kept", "keep": 3})
    with daemon(config) as process, process.connect() as client:
        first = train(client, 2)
        client.save("two")
        first |= train(client, 3)
        wait_until_archived(client)
        while len(list_steps(tmp_path / "kept")) > 3:
            pass
        assert sorted(archived(tmp_path / "kept")) == [2, 3, 4]
        client.load("two")
        client.set_policy_version(1)
        again = train(client, 1)
        wait_until_archived(client)
        while len(files := list_steps(tmp_path / "kept")) > 3:
            pass
        assert [file.step for file in files] == [3, 4, 2], "in the order of writing"
        newest, others = find_step(tmp_path / "kept", None)
        assert (newest.step, others) == (2, [])
        assert as_facts(list(read_groups(newest))) == again[2]
        assert newest.history not in {file.history for file in files[:2]}, "another history than before the load"


# -- the archiver alone: what a daemon gets into only by chance --------------------------------------------------------


class SyncedJournal(MemoryJournal):
    def __init__(self, ledger: Ledger, changed: Broadcast) -> None:
        super().__init__(ledger)
        self.changed = changed
        self.is_congested = False

    def record(self, event: Event) -> None:
        super().record(event)
        self.changed.notify()

    async def synced(self) -> None:
        await anyio.lowlevel.checkpoint()


class Run:
    """A ledger whose batches are formed and acknowledged by hand."""

    def __init__(self) -> None:
        self.changed = Broadcast()
        self.ledger = Ledger({"easy": SourceSize(100)}, nonce="n")
        self.journal = SyncedJournal(self.ledger, self.changed)
        self.log = LogCapture()

    def form(self, ranks: int = 1, samples: int = 2) -> int:
        events = [launch(self.journal, "easy", n=samples, rows=100) for _ in range(2 * ranks)]
        for event in events:
            assert event is not None
            self.journal.store_group(frame_for(event))
        indices = [event.group_index for event in events if event is not None]
        shares = [indices[rank::ranks] for rank in range(ranks)]
        step = self.ledger.step
        self.journal.record(BatchFormed(step, 0, {"easy": 1.0}, {"easy": len(indices)}, {"easy": 0.0}, shares))
        return step

    def train(self, ranks: int = 1, samples: int = 2) -> int:
        step = self.form(ranks, samples)
        for rank in range(ranks):
            self.journal.record(LeaseAcked(step, rank, archive=True))
        return step

    @asynccontextmanager
    async def archiver(self, directory: Path, format_: str = "jsonl", **options: Any) -> AsyncIterator[Archiver]:
        archiver = Archiver(
            directory=directory,
            format_=format_,
            keep=None,
            state=self.journal,
            changed=self.changed,
            log=structlog.wrap_logger(None, processors=[self.log]),
            **options,
        )
        async with anyio.create_task_group() as tasks:
            await tasks.start(archiver.run)
            yield archiver
            tasks.cancel_scope.cancel()

    async def until(self, condition: Callable[[], bool]) -> None:
        with anyio.fail_after(20):
            while not condition():  # noqa: ASYNC110 - faults are told by nobody
                await anyio.sleep(0.01)

    async def settled(self, archiver: Archiver) -> None:
        with anyio.fail_after(20):
            await archiver.flush()


async def test_a_batch_is_written_when_all_ranks_are_done_and_without_what_was_discarded(tmp_path: Path) -> None:
    run = Run()
    async with run.archiver(tmp_path) as archiver:
        whole, part = run.form(ranks=2), run.form(ranks=2)
        run.journal.record(LeaseAcked(whole, 0, archive=True))
        run.journal.record(LeaseAcked(part, 1, archive=True))
        run.journal.record(LeaseDiscarded(part, 0))
        await run.settled(archiver)
        assert [file.step for file in list_steps(tmp_path)] == [part]
        run.journal.record(LeaseAcked(whole, 1, archive=True))
        await run.settled(archiver)
    groups = {file.step: [g["group_index"] for g in read_groups(file)] for file in list_steps(tmp_path)}
    assert groups == {whole: [0, 1, 2, 3], part: [5, 7]}


async def test_a_crash_around_the_renaming_leads_to_one_whole_file(tmp_path: Path) -> None:
    run = Run()
    step, other = run.train(), run.train()
    records = list(run.journal.records)
    async with run.archiver(tmp_path) as archiver:
        await run.settled(archiver)
    (first, second) = list_steps(tmp_path)
    whole = first.path.read_bytes(), second.path.read_bytes()
    # a crash before the events were written: the files are there, one of them under the name it is written by
    second.path.rename(tmp_path / f"{second.path.name}.unfinished")
    (tmp_path / f"{second.path.name}.unfinished").write_bytes(whole[1][:-9])
    run.journal.records = records
    run.ledger = run.journal.ledger = run.journal.replayed({"easy": SourceSize(100)})
    assert {key.step for key in run.ledger.unarchived.batches} == {step, other}
    async with run.archiver(tmp_path) as archiver:
        await run.settled(archiver)
    assert sorted(os.listdir(tmp_path)) == sorted(file.path.name for file in (first, second))
    again = list_steps(tmp_path)
    assert (first.path.read_bytes(), second.path.read_bytes()) == whole
    assert first.written_ns in {file.written_ns for file in again}, "what is there is not written again"
    assert not run.ledger.unarchived.batches


async def test_a_file_system_that_hangs_is_named_and_what_waits_beyond_the_bound_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archiver_module, "SLOW_S", 0.05)
    run = Run()
    async with run.archiver(tmp_path, max_waiting_bytes=1) as archiver:
        step = run.form()
        pipe = tmp_path / f"step-{step:08d}.n.jsonl.unfinished"
        os.mkfifo(pipe)  # opening it blocks until somebody reads: as a network file system that is away
        run.journal.record(LeaseAcked(step, 0, archive=True))
        await run.until(lambda: archiver.statistics().fault is not None)
        fault = archiver.statistics().fault
        assert fault is not None
        assert fault.startswith(f"writing step {step} has taken")
        given_up = [run.train(), run.train()]
        await run.until(lambda: archiver.statistics().given_up == 2)
        assert archiver.statistics().waiting == 1, "the one that is being written is not given up"
        assert [entry["log_level"] for entry in run.log.entries] == ["error", "error"]
        assert f"step {given_up[0]} will not be in the archive: writing step {step}" in run.log.entries[0]["event"]
        reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)  # it is back, and fails: a pipe cannot be synced
        with anyio.fail_after(20):
            await archiver.flush()
        os.close(reader)
        assert archiver.statistics().waiting == 0
    assert [file.step for file in list_steps(tmp_path)] == [step]


async def test_where_the_states_own_disk_is_full_the_archive_gives_way(tmp_path: Path) -> None:
    run = Run()
    (tmp_path / "kept").write_text("in the way")
    async with run.archiver(tmp_path / "kept") as archiver:
        run.train()
        run.train()
        await run.until(lambda: archiver.statistics().fault is not None)
        assert archiver.statistics().waiting == 2
        run.journal.is_congested = True
        await run.settled(archiver)
        assert archiver.statistics().given_up == 2


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB; skipped where this process may not mount."""
    at = tmp_path / "small"
    at.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", at], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"this process may not mount: {mounted.stderr.decode().strip()}")
    yield at
    subprocess.run(["umount", "--lazy", at], check=True)


async def test_a_disk_that_is_full_leaves_no_half_file_and_is_used_when_it_has_room(small_disk: Path) -> None:
    run = Run()
    (small_disk / "filler").write_bytes(bytes(56 << 10))
    async with run.archiver(small_disk) as archiver:
        steps = [run.train(samples=40) for _ in range(4)]
        await run.until(lambda: archiver.statistics().fault is not None)
        fault = str(archiver.statistics().fault)
        assert fault.startswith("cannot write the archive")
        assert fault.endswith("No space left on device")
        assert archiver.statistics().waiting >= 3
        assert not [name for name in os.listdir(small_disk) if name.endswith(".unfinished")]
        (small_disk / "filler").unlink()
        await run.settled(archiver)
        assert (archiver.statistics().given_up, archiver.statistics().fault) == (0, None)
    assert [len(list(read_groups(find_step(small_disk, step)[0]))) for step in steps] == [2] * 4


async def test_a_group_that_the_disk_has_lost_costs_that_group_alone_and_is_named(tmp_path: Path) -> None:
    run = Run()
    step = run.form()
    index = run.ledger.leases.batches[step].shares[0].groups[0].group_index
    run.ledger.leases.batches[step].shares[0].groups[0].damage = "a record fails its checksum"
    async with run.archiver(tmp_path) as archiver:
        run.journal.record(LeaseAcked(step, 0, archive=True))
        await run.settled(archiver)
        assert archiver.statistics().damaged == 1
    assert [g["group_index"] for g in read_groups(find_step(tmp_path, step)[0])] == [index + 1]
    assert f"archived step {step} without 1 of its groups" in run.log.entries[0]["event"]


# -- reading ----------------------------------------------------------------------------------------------------------


async def test_reading_says_what_is_there_and_the_worst_come_first(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="has no archived step"):
        find_step(tmp_path / "away", 3)
    run = Run()
    for i in range(3):
        event = launch(run.journal, "easy", rows=100)
        assert event is not None
        run.journal.store_group(frame_for(event, rewards=[0.5 + i, -float(i)]))
    run.journal.record(BatchFormed(0, 0, {"easy": 1.0}, {"easy": 3}, {"easy": 0.0}, [[0, 1, 2]]))
    run.journal.record(LeaseAcked(0, 0, archive=True))
    async with run.archiver(tmp_path) as archiver:
        await run.settled(archiver)
    file, others = find_step(tmp_path, 0, "n")
    assert [excerpt.reward for excerpt in read_samples(file, worst=4)] == [-2.0, -1.0, 0.0, 0.5]
    assert not read_samples(file, worst=4, source="hard")
    assert not others
    with pytest.raises(ArchiveError, match=r"step 7 is not in the archive .*; it has 1 steps, from 0 to 0"):
        find_step(tmp_path, 7)
    with pytest.raises(ArchiveError, match="step 0 has no history 'm'; it has n"):
        find_step(tmp_path, 0, "m")
    file.path.write_bytes(file.path.read_bytes()[:-20])
    with pytest.raises(ArchiveError, match="cannot read"):
        list(read_groups(file))


async def test_parquet_says_the_same_and_has_the_tokens_as_well(tmp_path: Path) -> None:
    run = Run()
    step = run.train()
    groups = {}
    for format_ in ("jsonl", "parquet"):
        ledger = run.ledger = run.journal.ledger = run.journal.replayed({"easy": SourceSize(100)})
        assert ledger.unarchived.batches
        records = list(run.journal.records)
        async with run.archiver(tmp_path / format_, format_) as archiver:
            await run.settled(archiver)
        run.journal.records = records
        groups[format_] = list(read_groups(find_step(tmp_path / format_, step)[0]))
    for lines, row in zip(groups["jsonl"], groups["parquet"], strict=True):
        assert lines == {key: value for key, value in row.items() if key != "prompt_tokens"}
        assert row["prompt_tokens"] == [1, 2, 3]
    for row in pq.read_table(find_step(tmp_path / "parquet", step)[0].path).to_pylist():
        for sample in row["samples"]:
            assert sample["response_tokens"] == [0, 1, 2]
            assert (sample["logprobs"], sample["loss_mask"]) == ([-0.5] * 3, [1] * 3)
