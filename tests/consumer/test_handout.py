"""The lease desk: redelivery, ranks, splits. A real ledger and mixer, a journal in memory."""

from __future__ import annotations

import pytest

from orchestrator.concurrency.broadcast import Broadcast
from orchestrator.consumer.handout import Handout, Holder, LeaseDesk
from orchestrator.consumer.waits import Waiting
from orchestrator.core.ledger.events import SourcePaused, VersionSet
from orchestrator.core.ledger.ledger import Ledger, SourceSize
from orchestrator.core.mixture.mixer import Mixer
from orchestrator.core.mixture.outlook import Finished, Shortage
from orchestrator.core.weights.table import WeightTable, parse_weight
from orchestrator.errors import BadWorldSize, LeaseUnknown, RankInUse
from tests.support.builders import MemoryJournal, frame_for, launch

A, B = Holder(1, 100), Holder(2, 200)


class Desk:
    """A desk with two sources whose groups finish when a test says so."""

    def __init__(
        self,
        *,
        batch_size: int = 4,
        weights: tuple[float | str, ...] = (0.5, 0.5),
        num_rollout: int | None = None,
        max_staleness: int | None = None,
        epochs: int | None = None,
        rows: int = 1000,
    ) -> None:
        self.rows = rows
        self.ledger = Ledger({"easy": SourceSize(rows, epochs), "hard": SourceSize(rows, epochs)}, nonce="n")
        self.journal = MemoryJournal(self.ledger)
        self.mixer = Mixer(
            ledger=self.ledger,
            journal=self.journal,
            table=WeightTable(["easy", "hard"], [parse_weight(weight) for weight in weights]),
            batch_size=batch_size,
            lookahead=2,
            max_staleness=max_staleness,
            num_rollout=num_rollout,
            outstanding_bound=64,
            buffer_bounds={},
        )
        self.desk = LeaseDesk(ledger=self.ledger, journal=self.journal, mixer=self.mixer, changed=Broadcast())

    def finish(self, source: str, count: int, *, length: int = 3, version: int = 0) -> None:
        for _ in range(count):
            event = launch(self.journal, source, rows=self.rows)
            assert event is not None
            self.journal.store_group(frame_for(event, lengths=(length, length), version=version))

    def take(self, holder: Holder = A, rank: int = 0, world_size: int = 1) -> Handout:
        got = self.desk.claim(holder, rank, world_size)
        assert isinstance(got, Handout), got
        return got


def indices(handout: Handout) -> list[int]:
    return [group.group_index for group in handout.share.groups]


def test_a_batch_has_the_counts_of_its_step_and_says_what_it_lacks() -> None:
    d = Desk()
    d.finish("easy", 9)
    got = d.desk.claim(A, 0, 1)
    assert isinstance(got, Shortage)
    assert [(lack.source, lack.needed, lack.takeable) for lack in got.lacks] == [("hard", 2, 0)]
    assert d.ledger.step == 0, "waiting does not advance the step"
    d.finish("hard", 2)
    assert d.take().batch.counts == {"easy": 2, "hard": 2}
    assert d.ledger.step == 1


def test_what_is_not_acknowledged_comes_again_oldest_first_and_identical() -> None:
    d = Desk()
    d.finish("easy", 8)
    d.finish("hard", 8)
    first, second = d.take(), d.take()
    frames = [bytes(group.frame) for group in first.share.groups]
    d.desk.leave(A)
    again = d.take(B)
    assert again.lease == first.lease
    assert [bytes(group.frame) for group in again.share.groups] == frames
    assert d.take(B).lease == second.lease
    d.desk.ack(second.lease)
    d.desk.ack(second.lease)
    d.desk.nack(first.lease, discard=False)
    assert d.take(B).lease == first.lease


def test_a_rank_holds_two_leases_at_most() -> None:
    d = Desk()
    d.finish("easy", 20)
    d.finish("hard", 20)
    first, _ = d.take(), d.take()
    assert isinstance(d.desk.claim(A, 0, 1), Waiting)
    d.desk.ack(first.lease)
    assert d.take().batch.step == 2


def test_a_discarded_batch_is_counted_and_never_comes_again() -> None:
    d = Desk()
    d.finish("easy", 4)
    d.finish("hard", 4)
    first = d.take()
    d.desk.nack(first.lease, discard=True)
    assert d.take().batch.step == 1
    assert {name: state.dropped["discarded"].groups for name, state in d.ledger.sources.items()} == {
        "easy": 2,
        "hard": 2,
    }


def test_ranks_get_disjoint_complete_shares_of_the_same_step() -> None:
    d = Desk(batch_size=8)
    d.finish("easy", 16, length=50)
    d.finish("hard", 16, length=5)
    ranks = [Holder(10 + rank, rank) for rank in range(4)]
    shares = [d.take(ranks[0], 0, 4)]
    waiting = d.desk.claim(ranks[0], 0, 4)
    assert isinstance(waiting, Waiting)
    assert "rank 1, 2, 3" in waiting.sentence
    shares += [d.take(ranks[rank], rank, 4) for rank in (3, 1, 2)]
    assert {share.batch.step for share in shares} == {0}
    assert sorted(i for share in shares for i in indices(share)) == sorted(
        g.group_index for s in shares[0].batch.shares for g in s.groups
    )
    loads = [sum(group.tokens for group in share.share.groups) for share in shares]
    assert max(loads) == min(loads), "one long and one short group each"
    assert d.take(ranks[0], 0, 4).batch.step == 1


def test_a_rank_of_another_live_connection_is_refused_unless_taken_over() -> None:
    d = Desk()
    d.desk.take_rank(A, 0)
    with pytest.raises(RankInUse, match="process 100") as caught:
        d.desk.claim(B, 0, 1)
    assert caught.value.data == {"rank": 0, "pid": 100}
    assert d.desk.take_rank(B, 0, takeover=True) == A
    d.finish("easy", 2)
    d.finish("hard", 2)
    assert d.take(B).share.rank == 0


def test_another_world_size_shares_out_anew_and_ends_old_leases() -> None:
    d = Desk()
    d.finish("easy", 2)
    d.finish("hard", 2)
    whole = d.take(A)
    with pytest.raises(BadWorldSize, match="one of 1 ranks"):
        d.desk.claim(B, 1, 2)
    d.desk.leave(A)
    halves = [d.take(B, 1, 2), d.take(A, 0, 2)]
    assert sorted(indices(halves[0]) + indices(halves[1])) == sorted(g for g in range(4))
    with pytest.raises(LeaseUnknown):
        d.desk.ack(whole.lease)
    d.desk.leave(A)
    d.desk.leave(B)
    with pytest.raises(BadWorldSize, match="4 groups cannot be shared equally among 3"):
        d.desk.claim(A, 0, 3)


def test_acknowledging_twice_is_fine_across_a_new_split() -> None:
    d = Desk()
    d.finish("easy", 2)
    d.finish("hard", 2)
    first, second = d.take(A, 0, 2), d.take(B, 1, 2)
    d.desk.ack(first.lease)
    d.desk.leave(A)
    d.desk.leave(B)
    rest = d.take(A, 0, 1)
    assert indices(rest) == indices(second)
    d.desk.ack(first.lease)
    with pytest.raises(LeaseUnknown):
        d.desk.ack(second.lease)
    d.desk.ack(rest.lease)
    d.desk.ack(first.lease)


def test_a_paused_source_takes_no_part_and_a_step_without_any_waits() -> None:
    d = Desk()
    d.finish("easy", 8)
    d.journal.record(SourcePaused("hard"))
    assert d.take().batch.counts == {"easy": 4, "hard": 0}
    d.journal.record(SourcePaused("easy"))
    got = d.desk.claim(A, 0, 1)
    assert isinstance(got, Shortage)
    assert got.lacks == ()


def test_stale_groups_are_dropped_once_a_batch_forms_and_their_prompts_run_again() -> None:
    d = Desk(max_staleness=1)
    d.finish("easy", 2, version=0)
    d.finish("hard", 2, version=0)
    d.finish("easy", 2, version=2)
    d.finish("hard", 2, version=2)
    d.journal.record(VersionSet(2))
    got = d.take()
    assert sorted(indices(got)) == [4, 5, 6, 7]
    for state in d.ledger.sources.values():
        assert state.dropped["stale"].groups == 2
        assert [ref.prompt_index for ref in state.rerun] == [0, 1]
    event = launch(d.journal, "easy")
    assert event is not None
    assert (event.prompt_index, event.rerun, event.group_index) == (0, True, 8)


def test_num_rollout_and_exhaustion_end_the_run_with_the_leftover_counted() -> None:
    d = Desk(num_rollout=1)
    d.finish("easy", 4)
    d.finish("hard", 4)
    d.take()
    assert d.desk.claim(A, 0, 1) == Finished(1, 4)

    d = Desk(epochs=1, rows=5)
    d.finish("easy", 5)
    d.finish("hard", 2)
    assert isinstance(d.mixer.outlook(), Shortage) is False
    d.take()
    d.finish("hard", 3)
    assert d.take().batch.counts == {"easy": 2, "hard": 2}
    assert d.desk.claim(A, 0, 1) == Finished(2, 2)
