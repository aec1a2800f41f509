"""The ledger is a fold: replaying gives the same state, snapshots cut it anywhere, and every group is accounted for."""

from __future__ import annotations

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from orchestrator.core.ledger.events import (
    Archived,
    BatchFormed,
    Dropped,
    Launched,
    LeaseAcked,
    LeaseDiscarded,
    Resplit,
    SourceFacts,
    SourcePaused,
    SourceResumed,
    SourcesChanged,
    VersionSet,
    WeightSet,
)
from orchestrator.core.ledger.leases import split_batch
from orchestrator.core.ledger.ledger import Ledger, SourceSize
from orchestrator.core.ledger.partials import encode_partial, restore_samples
from orchestrator.core.ledger.source_state import SourceState
from orchestrator.errors import CorruptState, LeaseUnknown, VersionWentBack
from orchestrator.frames import GroupFrame
from orchestrator.records import Sample
from tests.support.builders import MemoryJournal, frame_for, launch, make_sample

SIZES = {"easy": SourceSize(5), "hard": SourceSize(3, epochs=2), "code": SourceSize(1)}


def snapshot_bytes(ledger: Ledger) -> bytes:
    return msgspec.json.encode(ledger.snapshot())


class LedgerMachine(RuleBasedStateMachine):
    """Random histories against an oracle that remembers where every group is."""

    @initialize()
    def start(self) -> None:
        self.journal = MemoryJournal(Ledger(SIZES, nonce="n"))
        self.ledger = self.journal.ledger
        self.where: dict[int, str] = {}
        self.events: dict[int, Launched] = {}
        self.cut: tuple[int, bytes] | None = None
        self.trained: dict[int, set[int]] = {}

    def _at(self, place: str) -> list[int]:
        return [index for index, where in self.where.items() if where == place]

    def _states(self) -> list[SourceState]:
        return [*self.ledger.sources.values(), *self.ledger.retired.values()]

    @rule(wanted=st.lists(st.sampled_from(sorted(SIZES)), unique=True, min_size=1), renamed=st.booleans())
    def change_sources(self, wanted: list[str], renamed: bool) -> None:
        gone = [name for name in self.ledger.sources if name not in wanted]
        old = gone[0] if renamed and gone else None
        was = {name: (s.epoch, s.position, list(s.rerun)) for name, s in self.ledger.sources.items()}
        lost = [i for name in gone for i in (*self.ledger.sources[name].in_flight, *self.ledger.sources[name].ready)]
        new = [name for name in wanted if name not in was]
        facts = [SourceFacts(name, *SIZES[name][:2], old if [name] == new[:1] else None) for name in wanted]
        self.journal.record(SourcesChanged(facts))
        assert list(self.ledger.sources) == wanted
        for index in lost:
            self.where[index] = "dropped"
        for name in set(was) & set(wanted):
            state = self.ledger.sources[name]
            assert (state.epoch, state.position, list(state.rerun)) == was[name]
        if old is not None and new and SIZES[new[0]].rows > was[old][1]:
            state = self.ledger.sources[new[0]]
            assert (state.epoch, state.position) == was[old][:2]

    @rule(source=st.sampled_from(sorted(SIZES)), n=st.integers(1, 3))
    def launch(self, source: str, n: int) -> None:
        if source not in self.ledger.sources:
            return
        event = launch(self.journal, source, n=n, rows=SIZES[source].rows)
        if event is None:
            assert source == "hard"
            return
        assert event.group_index == len(self.where)
        self.where[event.group_index] = "in_flight"
        self.events[event.group_index] = event

    @precondition(lambda self: self._at("in_flight"))
    @rule(data=st.data(), length=st.integers(0, 9), version=st.integers(0, 3))
    def finish(self, data: st.DataObject, length: int, version: int) -> None:
        index = data.draw(st.sampled_from(self._at("in_flight")))
        event = self.events[index]
        self.journal.store_group(frame_for(event, lengths=(length,) * event.n, version=version))
        self.where[index] = "ready"

    @precondition(lambda self: self._at("in_flight"))
    @rule(data=st.data(), length=st.integers(1, 9))
    def interrupt(self, data: st.DataObject, length: int) -> None:
        event = self.events[data.draw(st.sampled_from(self._at("in_flight")))]
        sample = make_sample(event.first_sample, length=length)
        self.journal.store_partial(
            encode_partial(source=event.source, group_index=event.group_index, slot=0, sample=sample, start=0)
        )

    @precondition(lambda self: self._at("in_flight") + self._at("ready"))
    @rule(data=st.data(), rerun=st.booleans())
    def drop(self, data: st.DataObject, rerun: bool) -> None:
        index = data.draw(st.sampled_from(self._at("in_flight") + self._at("ready")))
        self.journal.record(Dropped(self.events[index].source, index, "zero_std", [3, 4], rerun))
        self.where[index] = "dropped"

    @precondition(lambda self: self._at("ready"))
    @rule(count=st.integers(1, 4), world_size=st.integers(1, 2))
    def form(self, count: int, world_size: int) -> None:
        ready = [g for state in self.ledger.sources.values() for g in state.oldest_ready(count)]
        ready = ready[: len(ready) - len(ready) % world_size]
        if not ready:
            return
        counts = {name: sum(1 for g in ready if g.source == name) for name in self.ledger.sources}
        self.journal.record(
            BatchFormed(
                step=self.ledger.step,
                policy_version=self.ledger.policy_version,
                weights=dict.fromkeys(self.ledger.sources, 1 / 3),
                counts=counts,
                carry=dict.fromkeys(self.ledger.sources, 0.25),
                shares=split_batch(ready, world_size),
            )
        )
        for group in ready:
            self.where[group.group_index] = "leased"

    @precondition(lambda self: self.ledger.leases.batches)
    @rule(data=st.data(), discard=st.booleans())
    def finish_share(self, data: st.DataObject, discard: bool) -> None:
        batch, share = data.draw(st.sampled_from(list(self.ledger.leases.open_shares())))
        lease = self.ledger.leases.name(batch, share.rank)
        indices = [g.group_index for g in share.groups]
        archive = not discard and data.draw(st.booleans())
        event = LeaseDiscarded(batch.step, share.rank) if discard else LeaseAcked(batch.step, share.rank, archive)
        self.journal.record(event)
        if archive:
            self.trained.setdefault(batch.step, set()).update(indices)
        assert self.ledger.leases.find(lease, self.ledger.step) is None, "acknowledging twice is fine"
        for index in indices:
            self.where[index] = "dropped" if discard else "acknowledged"

    @precondition(lambda self: self.trained)
    @rule(data=st.data())
    def archive(self, data: st.DataObject) -> None:
        ready = [b.key.step for b in self.ledger.unarchived.ready("n", iter(self.ledger.leases.batches))]
        assert set(ready) == set(self.trained) - set(self.ledger.leases.batches)
        if ready:
            step = data.draw(st.sampled_from(ready))
            self.journal.record(Archived("n", step))
            del self.trained[step]

    @precondition(lambda self: self.ledger.leases.batches)
    @rule(data=st.data())
    def resplit(self, data: st.DataObject) -> None:
        batch = data.draw(st.sampled_from(list(self.ledger.leases.batches.values())))
        old = self.ledger.leases.name(batch, 0)
        was_done, groups = batch.shares[0].is_done, batch.unfinished_groups()
        self.journal.record(Resplit(step=batch.step, shares=split_batch(groups, 1), split=batch.split + 1))
        if was_done:
            assert self.ledger.leases.find(old, self.ledger.step) is None, "acknowledging twice is fine"
            return
        with pytest.raises(LeaseUnknown):
            self.ledger.leases.find(old, self.ledger.step)

    @rule(source=st.sampled_from(sorted(SIZES)), weight=st.sampled_from([None, 0.5, "lambda step: 1"]))
    def control(self, source: str, weight: float | str | None) -> None:
        state = self.ledger.sources.get(source)
        if state is None:
            return
        self.journal.record(WeightSet(source, weight, 0.3))
        self.journal.record(SourceResumed(source) if state.paused else SourcePaused(source))
        self.journal.record(VersionSet(self.ledger.policy_version + 1))

    @rule()
    def remember_snapshot(self) -> None:
        self.cut = (len(self.journal.records), snapshot_bytes(self.ledger))

    @invariant()
    def accounting_adds_up(self) -> None:
        leased = {g.group_index for _, share in self.ledger.leases.open_shares() for g in share.groups}
        assert leased == set(self._at("leased"))
        assert {b.key.step: set(b.groups) for b in self.ledger.unarchived.batches.values()} == self.trained
        groups, partials = self.ledger.held()
        needed = {group.group_index for group in groups}
        needed |= {GroupFrame(frame).header["group_index"] for _, frame in partials}
        assert needed >= {index for groups in self.trained.values() for index in groups}, "its frames are kept"
        for state in self._states():
            assert set(state.in_flight) == {i for i in self._at("in_flight") if self.events[i].source == state.name}
            assert set(state.ready) == {i for i in self._at("ready") if self.events[i].source == state.name}
            mine = sum(1 for i in leased if self.events[i].source == state.name)
            dropped = sum(count.groups for count in state.dropped.values())
            assert state.launched == state.outstanding + mine + state.acknowledged + dropped
            assert state.ready_bytes == sum(len(group.frame) for group in state.ready.values())

    def teardown(self) -> None:
        if not hasattr(self, "journal"):
            return
        now = snapshot_bytes(self.ledger)
        assert snapshot_bytes(self.journal.replayed(SIZES)) == now, "replay from nothing"
        if self.cut is not None:
            at, data = self.cut
            start = Ledger(SIZES, nonce="n")
            start.load(msgspec.json.decode(data), self.journal.frame_at)
            assert snapshot_bytes(start) == data, "a snapshot reads back as it was written"
            assert snapshot_bytes(self.journal.replayed(SIZES, start=start, skip=at)) == now, "replay from a snapshot"


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_records_that_do_not_fit_are_refused() -> None:
    ledger = Ledger(SIZES, nonce="n")
    with pytest.raises(CorruptState, match="step 4"):
        ledger.apply(BatchFormed(4, 0, {}, {}, {}, [[]]))
    with pytest.raises(CorruptState, match="group 7"):
        ledger.apply(Launched("easy", 7, 0, 2, 0, 0))
    ledger.apply(VersionSet(3))
    with pytest.raises(VersionWentBack, match="below 3"):
        ledger.apply(VersionSet(2))


@pytest.mark.parametrize("lease", ["", "n", "other.0.0.0", "n.0.0", "n.9.0.0", "n.x.0.0", "n.0.0.0.0", "n.-1.0.0"])
def test_unknown_leases_are_refused(lease: str) -> None:
    with pytest.raises(LeaseUnknown):
        Ledger(SIZES, nonce="n").leases.find(lease, 1)


def test_a_source_that_was_renamed_and_one_that_takes_its_old_name_are_observed_apart() -> None:
    journal = MemoryJournal(Ledger({"code": SourceSize(5)}, nonce="n"))
    came_back = [SourceFacts("code", 5, None), SourceFacts("easy", 5, None)]
    for wanted in ([SourceFacts("easy", 5, None, "code")], came_back):
        first = launch(journal, next(iter(journal.ledger.sources)))
        assert first is not None
        journal.store_group(frame_for(first))
        journal.record(SourcesChanged(wanted))
    at, data = len(journal.records), snapshot_bytes(journal.ledger)
    event = launch(journal, "code")
    assert event is not None
    journal.store_group(frame_for(event))
    start = Ledger({}, nonce="n")
    start.load(msgspec.json.decode(data), journal.frame_at)
    replayed = journal.replayed({}, start=start, skip=at)
    assert snapshot_bytes(replayed) == snapshot_bytes(journal.ledger)


def test_bounded_overtaking() -> None:
    """A group in flight is overtaken in at most `lookahead` batches; then younger ones wait for it."""
    journal = MemoryJournal(Ledger(SIZES, nonce="n"))
    slow, *fast = [launch(journal, "easy") for _ in range(6)]
    assert slow is not None
    state = journal.ledger.sources["easy"]
    for step, event in enumerate(fast[:2]):
        assert event is not None
        journal.store_group(frame_for(event))
        assert state.takeable(lookahead=2) == 1
        journal.record(BatchFormed(step, 0, {}, {}, {}, [[event.group_index]]))
    for event in fast[2:]:
        assert event is not None
        journal.store_group(frame_for(event))
    assert state.in_flight[0].overtaken == 2
    assert state.takeable(lookahead=2) == 0
    assert state.blocked_by(lookahead=2) == 0
    journal.store_group(frame_for(slow))
    assert state.takeable(lookahead=2) == 4
    assert [g.group_index for g in state.oldest_ready(2)] == [0, 3]


def test_partials_are_deltas_that_merge_to_the_sample() -> None:
    whole = Sample(index=8)
    frames = []
    for version, tokens in [(1, [1, 2, 3]), (1, [4]), (3, [5, 6])]:
        start = len(whole.tokens)
        whole.extend(tokens, [-0.1 * t for t in tokens], version)
        frames.append(encode_partial(source="easy", group_index=0, slot=1, sample=whole, start=start))
    _, restored = restore_samples(7, 2, frames)
    assert (restored.tokens, restored.logprobs, restored.versions) == (whole.tokens, whole.logprobs, whole.versions)
    assert restored.versions == [[1, 4], [3, 2]]
    fresh = make_sample(8, length=2, version=9)
    frames.append(encode_partial(source="easy", group_index=0, slot=1, sample=fresh, start=0))
    _, restored = restore_samples(7, 2, frames)
    assert (list(restored.tokens), restored.versions, restored.reward) == ([0, 1], [[9, 2]], 1.0)


def test_a_batch_is_shared_equally_and_balanced_by_tokens() -> None:
    journal = MemoryJournal(Ledger(SIZES, nonce="n"))
    lengths = [100, 90, 10, 10, 10, 10, 10, 80]
    groups = []
    for length in lengths:
        event = launch(journal, "easy")
        assert event is not None
        groups.append(journal.store_group(frame_for(event, lengths=(length, length))))
    shares = split_batch(groups, 4)
    assert sorted(i for share in shares for i in share) == list(range(8))
    assert {len(share) for share in shares} == {2}
    loads = [sum(2 * lengths[i] for i in share) for share in shares]
    assert max(loads) <= 220


def test_what_waits_for_the_archive_is_part_of_a_snapshot_and_survives_going_back() -> None:
    journal = MemoryJournal(Ledger(SIZES, nonce="n"))
    event = launch(journal, "easy")
    assert event is not None
    journal.store_group(frame_for(event))
    before = msgspec.json.decode(snapshot_bytes(journal.ledger))
    journal.record(BatchFormed(0, 0, {"easy": 1.0}, {}, {}, [[0]]))
    journal.record(LeaseAcked(0, 0, archive=True))
    read_back = Ledger(SIZES, nonce="n")
    read_back.load(msgspec.json.decode(snapshot_bytes(journal.ledger)), journal.frame_at)
    (batch,) = read_back.unarchived.batches.values()
    assert (batch.key, batch.weights, list(batch.groups)) == (("n", 0), {"easy": 1.0}, [0])
    assert next(read_back.unarchived.groups()).frame == frame_for(event)
    new = Ledger(SIZES, nonce="x")
    new.restore(msgspec.json.decode(snapshot_bytes(journal.ledger)), journal.frame_at, "y")
    assert [key.history for key in new.unarchived.batches] == ["n"], "taken over with the checkpoint"
    read_back.restore(before, journal.frame_at, "m")  # a checkpoint of before: what was trained on was trained on
    assert [key.history for key in read_back.unarchived.batches] == ["n"]
    read_back.apply(Archived("n", 0))
    assert not read_back.unarchived.batches
    with pytest.raises(CorruptState, match="does not match the state"):
        read_back.apply(Archived("n", 0))
