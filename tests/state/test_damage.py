"""Damage costs what it hit and no more: the group is dropped, named, and its prompt runs again."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import anyio
import pytest

from orchestrator.core.ledger.events import BatchFormed, Launched, LeaseAcked, VersionSet
from orchestrator.core.ledger.groups import Place
from orchestrator.core.ledger.ledger import DAMAGED, Ledger, SourceSize
from orchestrator.core.ledger.partials import encode_partial
from orchestrator.errors import ForeignState, StateError
from orchestrator.state import StateStore
from orchestrator.state.recovery import recover
from orchestrator.state.segments import list_segments, segment_path
from orchestrator.state.snapshots import list_snapshots, snapshot_path
from tests.support.builders import frame_for, make_sample
from tests.support.paths import STATE_V1
from tests.support.state_histories import SIZES, act, digest, facts, opened


def flip(directory: Path, place: Place, at: int = 50) -> None:
    """Flip a bit of a record's body."""
    with segment_path(directory, place.segment).open("r+b") as file:
        file.seek(place.offset + at)
        [byte] = file.read(1)
        file.seek(place.offset + at)
        file.write(bytes([byte ^ 4]))


async def _grown(directory: Path) -> None:
    """A state whose frames lie in old segments: groups 0 and 1 leased, 2 and 3 buffered, 4 in flight with a partial."""
    async with opened(directory, segment_bytes=700) as store:
        for i in range(5):
            event = store.ledger.next_launch("easy" if i % 2 == 0 else "hard", 2, lambda _, position: position)
            assert isinstance(event, Launched)
            store.record(event)
            if i < 4:
                store.store_group(frame_for(event, lengths=(5 + i, 9)))
        flight = store.ledger.source("easy").in_flight[4]
        store.store_partial(
            encode_partial(
                source="easy", group_index=4, slot=0, sample=make_sample(flight.first_sample, length=3), start=0
            )
        )
        store.record(BatchFormed(0, 0, {}, {"easy": 1, "hard": 1}, {}, [[0, 1]]))
        await store.snapshot()
        for version in range(1, 30):
            store.record(VersionSet(version))


def places(ledger: Ledger) -> dict[int, Place]:
    found = {group.group_index: group.place for state in ledger.sources.values() for group in state.ready.values()}
    found |= {g.group_index: g.place for _, share in ledger.leases.open_shares() for g in share.groups}
    found |= {
        f.group_index: f.partials[0][0] for s in ledger.sources.values() for f in s.in_flight.values() if f.partials
    }
    return found


@pytest.mark.parametrize(("index", "source", "where"), [(2, "easy", "buffered"), (4, "easy", "in flight")])
async def test_a_damaged_frame_costs_its_own_group_and_its_prompt_runs_again(
    tmp_path: Path, index: int, source: str, where: str
) -> None:
    await _grown(tmp_path)
    ledger, _ = recover(tmp_path, SIZES, "x")
    state = ledger.source(source)
    prompt = (state.ready[index] if index in state.ready else state.in_flight[index]).prompt
    flip(tmp_path, places(ledger)[index])
    for restart in range(3):
        async with opened(tmp_path, segment_bytes=700) as store:
            [*problems] = store.recovery.problems
            after = store.ledger
            assert facts(after, without=[index])["leases"] == facts(ledger)["leases"]
            assert set(places(after)) == {0, 1, 2, 3, 4} - {index}
            assert after.source(source).dropped[DAMAGED].groups == 1
            assert list(after.source(source).rerun) == [prompt]
            if restart == 0:
                [problem] = problems
                assert f"group {index} of {source} ({where})" in problem
                assert "checksum" in problem
            else:
                assert not problems, "the drop is in the log"
    event = after.next_launch(source, 2, lambda _, position: position)
    assert event is not None
    assert (event.prompt_index, event.epoch, event.rerun) == (*prompt, True)


async def test_what_is_recorded_after_a_loss_fits_it_also_without_a_new_snapshot(tmp_path: Path) -> None:
    """The prompt runs again, the snapshot after that never comes: the next restart has to know of the drop first."""
    await _grown(tmp_path)
    ledger, _ = recover(tmp_path, SIZES, "x")
    flip(tmp_path, places(ledger)[2])
    store = await StateStore.open(tmp_path, SIZES, segment_bytes=700)
    event = store.ledger.next_launch("easy", 2, lambda _, position: position)
    assert event is not None
    assert event.rerun
    store.record(event)
    await store._writer.flush()
    await store._writer.aclose()
    again, recovery = recover(tmp_path, SIZES, "x")
    assert facts(again) == facts(store.ledger)
    assert recovery.problems == []


async def test_of_a_leased_batch_only_the_damaged_group_is_missing(tmp_path: Path) -> None:
    await _grown(tmp_path)
    ledger, _ = recover(tmp_path, SIZES, "x")
    flip(tmp_path, places(ledger)[1])
    async with opened(tmp_path) as store:
        [problem] = store.recovery.problems
        assert "group 1 of hard (leased at step 0)" in problem
        batch = store.ledger.leases.batches[0]
        assert [group.group_index for group in batch.shares[0].groups] == [0]
        hard = store.ledger.source("hard")
        assert (hard.dropped[DAMAGED].groups, len(hard.rerun)) == (1, 1)
        lease = store.ledger.leases.name(batch, 0)
        store.record(LeaseAcked(0, 0))
        assert store.ledger.leases.find(lease, 1) is None
        easy = store.ledger.source("easy")
        assert (easy.acknowledged, hard.acknowledged) == (1, 0)


async def test_a_share_of_which_nothing_is_left_is_done(tmp_path: Path) -> None:
    await _grown(tmp_path)
    ledger, _ = recover(tmp_path, SIZES, "x")
    for index in (0, 1):
        flip(tmp_path, places(ledger)[index])
    async with opened(tmp_path) as store:
        assert not store.ledger.leases.batches
        assert len(store.recovery.problems) == 2


async def test_what_was_acknowledged_or_moved_since_the_snapshot_is_no_loss(tmp_path: Path) -> None:
    """The frames are damaged, but the log after the snapshot says that they are needed no more, or lie elsewhere."""
    directory = tmp_path / "state"
    directory.mkdir()
    await _grown(directory)
    store = await StateStore.open(directory, SIZES, segment_bytes=8000)
    async with anyio.create_task_group() as tasks:
        await tasks.start(store.run)
        before = places(store.ledger)
        store.record(LeaseAcked(0, 0))
        await store.compact()
        await store.written()
        expected = facts(store.ledger)
        moved = [index for index in (2, 3) if places(store.ledger)[index] != before[index]]
        assert moved
        copy = tmp_path / "copy"
        shutil.copytree(directory, copy)
        tasks.cancel_scope.cancel()
    await store.aclose()
    for index in (0, 1, *moved):
        flip(copy, before[index])
    ledger, recovery = recover(copy, SIZES, "x")
    assert facts(ledger) == expected
    assert recovery.problems == []
    assert ledger.source("easy").ready_bytes == sum(len(g.frame) for g in ledger.source("easy").ready.values())
    assert ledger.source("hard").ready_tokens == sum(g.tokens for g in ledger.source("hard").ready.values())


@pytest.mark.parametrize("missing", [False, True])
async def test_a_lost_segment_costs_the_groups_in_it(tmp_path: Path, missing: bool) -> None:
    await _grown(tmp_path)
    ledger, _ = recover(tmp_path, SIZES, "x")
    where = places(ledger)
    segment = where[2].segment
    lost = {index for index, place in where.items() if place.segment == segment}
    path = segment_path(tmp_path, segment)
    if missing:
        path.unlink()
    else:
        path.write_bytes(b"\0" + path.read_bytes()[1:])
    async with opened(tmp_path) as store:
        assert set(places(store.ledger)) == set(where) - lost
        assert len(store.recovery.problems) == len(lost)
        assert sum(s.dropped[DAMAGED].groups for s in store.ledger.sources.values() if DAMAGED in s.dropped) == len(
            lost
        )


async def _restarts(directory: Path, history: list[dict[str, object]]) -> None:
    """Whatever was damaged: a restart lands on a moment that was, says so, and what is written then is found again."""
    async with opened(directory, segment_bytes=2048) as store:
        assert facts(store.ledger) in history
        assert store.recovery.problems
        store.record(VersionSet(1000))
        expected = facts(store.ledger)
        await store.written()
        copy = directory.parent / "again"
        shutil.copytree(directory, copy)
    for snapshot in list_snapshots(copy)[:1]:  # as if the first snapshot after the damage had failed
        snapshot_path(copy, snapshot).unlink()
    ledger, recovery = recover(copy, SIZES, "x")
    assert facts(ledger) == expected
    assert recovery.problems == []


def _without_a_segment(directory: Path) -> None:
    segment_path(directory, list_segments(directory)[-3]).unlink()


def _with_another_header(directory: Path) -> None:
    path = segment_path(directory, list_segments(directory)[-3])
    path.write_bytes(b"X" + path.read_bytes()[1:])


def _cut_between_two_records(directory: Path) -> None:
    from orchestrator.state.segments import Segment

    segment = Segment(directory, list_segments(directory)[-3])
    offsets = [record.place.offset - 16 for record in segment.records()]  # type: ignore[union-attr]
    with segment.path.open("r+b") as file:
        file.truncate(offsets[-1])


def _cut_to_nothing(directory: Path) -> None:
    segment_path(directory, list_segments(directory)[-3]).write_bytes(b"")


def _flipped_in_the_middle(directory: Path) -> None:
    path = segment_path(directory, list_segments(directory)[-3])
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [_without_a_segment, _with_another_header, _cut_between_two_records, _cut_to_nothing, _flipped_in_the_middle],
)
async def test_damage_in_the_middle_of_the_log_is_cut_off_for_good(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    directory = tmp_path / "state"
    directory.mkdir()
    history = []
    store = await StateStore.open(directory, SIZES, segment_bytes=2048)
    async with anyio.create_task_group() as tasks:
        await tasks.start(store.run)
        rng = random.Random(4)
        history.append(facts(store.ledger))
        for _ in range(120):
            act(store, rng)
            history.append(facts(store.ledger))
        await store.written()
        tasks.cancel_scope.cancel()
    await store._writer.aclose()
    assert len(list_segments(directory)) > 4
    before = sum(path.stat().st_size for path in directory.glob("log-*"))
    damage(directory)
    left = sum(path.stat().st_size for path in directory.glob("log-*"))
    await _restarts(directory, history)
    aside = sum(path.stat().st_size for path in directory.glob("*.damaged"))
    assert aside > 0
    assert left <= before
    assert aside < before


async def test_the_snapshots_own_segment_may_be_lost(tmp_path: Path) -> None:
    """The snapshot points behind the end of a file that is not there: what is written next is found all the same."""
    directory = tmp_path / "state"
    directory.mkdir()
    async with opened(directory, segment_bytes=1 << 20) as store:
        for version in range(1, 40):
            store.record(VersionSet(version))
        await store.snapshot()
        history = [facts(store.ledger)]
    newest = list_snapshots(directory)[0]
    for cut in (None, 20, 700):
        copy = tmp_path / f"copy-{cut}" / "state"
        shutil.copytree(directory, copy)
        path = segment_path(copy, list_segments(copy)[-1])
        if cut is None:
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:cut])
        assert list_snapshots(copy)[0] == newest
        await _restarts(copy, history)


async def test_recovering_on_a_disk_without_room_for_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(tmp_path) as store:
        store.record(VersionSet(3))
    with segment_path(tmp_path, list_segments(tmp_path)[-1]).open("ab") as file:
        file.write(b"RL torn")
    real = Path.open

    def full(path: Path, mode: str = "r", *arguments: object) -> object:
        if "w" in mode and ".damaged" in path.name:
            raise OSError(28, "No space left on device")
        return real(path, mode, *arguments)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", full)
    ledger, recovery = recover(tmp_path, SIZES, "x")
    assert ledger.policy_version == 3
    assert "No space left" in recovery.problems[0]
    assert recover(tmp_path, SIZES, "x")[1].problems == []


async def test_bytes_that_hold_nothing_are_watched_too(tmp_path: Path) -> None:
    store = await StateStore.open(tmp_path, SIZES)
    store.record(VersionSet(7))
    await store.aclose()
    for snapshot in list_snapshots(tmp_path):
        snapshot_path(tmp_path, snapshot).unlink()
    path = segment_path(tmp_path, list_segments(tmp_path)[0])
    data = bytearray(path.read_bytes())
    data[16 + 3] = 1
    path.write_bytes(data)
    ledger, recovery = recover(tmp_path, SIZES, "x")
    assert ledger.policy_version == 7
    assert "nothing was lost" in recovery.problems[0]


async def test_a_log_of_other_sources_without_a_snapshot_is_refused(tmp_path: Path) -> None:
    store = await StateStore.open(tmp_path, SIZES)
    event = store.ledger.next_launch("hard", 2, lambda _, position: position)
    assert event is not None
    store.record(event)
    await store.aclose()
    for snapshot in list_snapshots(tmp_path):
        snapshot_path(tmp_path, snapshot).unlink()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ForeignState, match="hard"):
        recover(tmp_path, {"easy": SourceSize(50)}, "x")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("kind", ["segment", "snapshot"])
async def test_a_format_of_the_future_is_refused_and_left_alone(tmp_path: Path, kind: str) -> None:
    async with opened(tmp_path) as store:
        store.record(VersionSet(1))
    if kind == "segment":
        path = segment_path(tmp_path, list_segments(tmp_path)[-1])
        data = path.read_bytes()
        assert data[7] == 2
        path.write_bytes(data[:7] + b"\x03" + data[8:])
    else:
        path = snapshot_path(tmp_path, list_snapshots(tmp_path)[0])
        path.write_bytes(path.read_bytes().replace(b"ROLSNAP 2 ", b"ROLSNAP 3 "))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(StateError, match=f"{path.name} is of format 3, this version reads formats up to 2"):
        await StateStore.open(tmp_path, SIZES)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


"""A state directory as format 1 was written, copied while its daemon ran, and what that daemon knew."""


def summary(ledger: Ledger) -> dict[str, object]:
    groups, partials = ledger.held()
    return {
        "step": ledger.step,
        "next_group": ledger.next_group,
        "next_sample": ledger.next_sample,
        "policy_version": ledger.policy_version,
        "nonce": ledger.leases.nonce,
        "frames": sorted(
            digest(frame) for frame in [*(group.frame for group in groups), *(frame for _, frame in partials)]
        ),
        "sources": {
            name: {
                "position": s.position,
                "epoch": s.epoch,
                "carry": s.carry,
                "paused": s.paused,
                "weight_override": s.weight_override,
                "rerun": [list(prompt) for prompt in s.rerun],
                "in_flight": sorted(s.in_flight),
                "ready": sorted(s.ready),
                "launched": s.launched,
                "acknowledged": s.acknowledged,
                "dropped": {reason: count.groups for reason, count in s.dropped.items()},
            }
            for name, s in ledger.sources.items()
        },
        "leases": {
            str(step): [[share.is_done, [g.group_index for g in share.groups]] for share in batch.shares]
            for step, batch in ledger.leases.batches.items()
        },
    }


@pytest.mark.parametrize("stepped_over", [0, 1])
async def test_format_1_is_read_and_goes_on_as_format_2(tmp_path: Path, stepped_over: int) -> None:
    directory = tmp_path / "state"
    shutil.copytree(STATE_V1, directory)
    expected = json.loads((directory / "expected.json").read_text())
    for number in list_snapshots(directory)[:stepped_over]:
        snapshot_path(directory, number).unlink()
    async with opened(directory, segment_bytes=8192) as store:
        assert summary(store.ledger) == expected
        assert store.recovery.problems == []
        store.record(VersionSet(1000))
        await store.compact()
    ledger, recovery = recover(directory, SIZES, "x")
    assert summary(ledger) == expected | {"policy_version": 1000}
    assert recovery.problems == []


async def test_a_damaged_frame_of_format_1_steps_back_to_the_snapshot_before(tmp_path: Path) -> None:
    """That format does not say whose a frame is: the older snapshot and the log after it say it."""
    directory = tmp_path / "state"
    shutil.copytree(STATE_V1, directory)
    ledger, _ = recover(directory, SIZES, "x")
    expected = summary(ledger)
    flip(directory, max(g.place for _, s in ledger.leases.open_shares() for g in s.groups if g.place.segment < 15))
    ledger, recovery = recover(directory, SIZES, "x")
    assert recovery.snapshot == 6
    assert "skipped snapshot 7" in recovery.problems[0]
    assert summary(ledger) != expected
