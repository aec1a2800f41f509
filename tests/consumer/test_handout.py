"""Handing out: redelivery, ranks, splits. A real ledger and mixer, a journal in memory."""

from __future__ import annotations

import pytest

from orchestrator.concurrency.broadcast import Broadcast
from orchestrator.consumer.handout import Handout, Handouts, Holder
from orchestrator.consumer.waits import Waiting
from orchestrator.core.ledger.events import SourcePaused, VersionSet
from orchestrator.core.ledger.ledger import Ledger, SourceSize
from orchestrator.core.mixture.mixer import Mixer, MixerSettings
from orchestrator.core.mixture.outlook import Finished, Shortage
from orchestrator.core.weights.forms import parse_weight
from orchestrator.core.weights.table import WeightTable
from orchestrator.errors import BadWorldSize, LeaseUnknown, RankInUse
from tests.support.builders import MemoryJournal, frame_for, launch

A, B = Holder(1, 100), Holder(2, 200)


class Setup:
    """Handouts of two sources whose groups finish when a test says so."""

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
            settings=MixerSettings(
                batch_size=batch_size,
                lookahead=2,
                max_staleness=max_staleness,
                num_rollout=num_rollout,
                outstanding_bound=64,
            ),
        )
        self.handouts = Handouts(ledger=self.ledger, journal=self.journal, mixer=self.mixer, changed=Broadcast())

    def finish(self, source: str, count: int, *, length: int = 3, version: int = 0) -> None:
        for _ in range(count):
            event = launch(self.journal, source, rows=self.rows)
            assert event is not None
            self.journal.store_group(frame_for(event, lengths=(length, length), version=version))

    def take(self, holder: Holder = A, rank: int = 0, world_size: int = 1) -> Handout:
        got = self.handouts.claim(holder, rank, world_size)
        assert isinstance(got, Handout), got
        return got


def indices(handout: Handout) -> list[int]:
    return [group.group_index for group in handout.share.groups]


def test_a_batch_has_the_counts_of_its_step_and_says_what_it_lacks() -> None:
    setup = Setup()
    setup.finish("easy", 9)
    got = setup.handouts.claim(A, 0, 1)
    assert isinstance(got, Shortage)
    assert [(lack.source, lack.needed, lack.takeable) for lack in got.lacks] == [("hard", 2, 0)]
    assert setup.ledger.step == 0, "waiting does not advance the step"
    setup.finish("hard", 2)
    assert setup.take().batch.counts == {"easy": 2, "hard": 2}
    assert setup.ledger.step == 1


def test_what_is_not_acknowledged_comes_again_oldest_first_and_identical() -> None:
    setup = Setup()
    setup.finish("easy", 8)
    setup.finish("hard", 8)
    first, second = setup.take(), setup.take()
    frames = [bytes(group.frame) for group in first.share.groups]
    setup.handouts.leave(A)
    again = setup.take(B)
    assert again.lease == first.lease
    assert [bytes(group.frame) for group in again.share.groups] == frames
    assert setup.take(B).lease == second.lease
    setup.handouts.ack(second.lease)
    setup.handouts.ack(second.lease)
    setup.handouts.nack(first.lease, discard=False)
    assert setup.take(B).lease == first.lease


def test_a_rank_holds_two_leases_at_most() -> None:
    setup = Setup()
    setup.finish("easy", 20)
    setup.finish("hard", 20)
    first, _ = setup.take(), setup.take()
    assert isinstance(setup.handouts.claim(A, 0, 1), Waiting)
    setup.handouts.ack(first.lease)
    assert setup.take().batch.step == 2


def test_a_discarded_batch_is_counted_and_never_comes_again() -> None:
    setup = Setup()
    setup.finish("easy", 4)
    setup.finish("hard", 4)
    first = setup.take()
    setup.handouts.nack(first.lease, discard=True)
    assert setup.take().batch.step == 1
    assert {name: state.dropped["discarded"].groups for name, state in setup.ledger.sources.items()} == {
        "easy": 2,
        "hard": 2,
    }


def test_ranks_get_disjoint_complete_shares_of_the_same_step() -> None:
    setup = Setup(batch_size=8)
    setup.finish("easy", 16, length=50)
    setup.finish("hard", 16, length=5)
    ranks = [Holder(10 + rank, rank) for rank in range(4)]
    shares = [setup.take(ranks[0], 0, 4)]
    waiting = setup.handouts.claim(ranks[0], 0, 4)
    assert isinstance(waiting, Waiting)
    assert "rank 1, 2, 3" in waiting.sentence
    shares += [setup.take(ranks[rank], rank, 4) for rank in (3, 1, 2)]
    assert {share.batch.step for share in shares} == {0}
    assert sorted(i for share in shares for i in indices(share)) == sorted(
        g.group_index for s in shares[0].batch.shares for g in s.groups
    )
    loads = [sum(group.tokens for group in share.share.groups) for share in shares]
    assert max(loads) == min(loads), "one long and one short group each"
    assert setup.take(ranks[0], 0, 4).batch.step == 1


def test_a_rank_of_another_live_connection_is_refused_unless_taken_over() -> None:
    setup = Setup()
    setup.handouts.take_rank(A, 0)
    with pytest.raises(RankInUse, match="process 100") as caught:
        setup.handouts.claim(B, 0, 1)
    assert caught.value.data == {"rank": 0, "pid": 100}
    assert setup.handouts.take_rank(B, 0, takeover=True) == A
    setup.finish("easy", 2)
    setup.finish("hard", 2)
    assert setup.take(B).share.rank == 0


def test_another_world_size_shares_out_anew_and_ends_old_leases() -> None:
    setup = Setup()
    setup.finish("easy", 2)
    setup.finish("hard", 2)
    whole = setup.take(A)
    with pytest.raises(BadWorldSize, match="with world_size 1"):
        setup.handouts.claim(B, 1, 2)
    setup.handouts.leave(A)
    halves = [setup.take(B, 1, 2), setup.take(A, 0, 2)]
    assert sorted(indices(halves[0]) + indices(halves[1])) == sorted(g for g in range(4))
    with pytest.raises(LeaseUnknown):
        setup.handouts.ack(whole.lease)
    setup.handouts.leave(A)
    setup.handouts.leave(B)
    with pytest.raises(BadWorldSize, match="4 groups cannot be divided equally among 3 ranks"):
        setup.handouts.claim(A, 0, 3)


def test_acknowledging_twice_is_fine_across_a_new_split() -> None:
    setup = Setup()
    setup.finish("easy", 2)
    setup.finish("hard", 2)
    first, second = setup.take(A, 0, 2), setup.take(B, 1, 2)
    setup.handouts.ack(first.lease)
    setup.handouts.leave(A)
    setup.handouts.leave(B)
    rest = setup.take(A, 0, 1)
    assert indices(rest) == indices(second)
    setup.handouts.ack(first.lease)
    with pytest.raises(LeaseUnknown):
        setup.handouts.ack(second.lease)
    setup.handouts.ack(rest.lease)
    setup.handouts.ack(first.lease)


def test_a_paused_source_takes_no_part_and_a_step_without_any_waits() -> None:
    setup = Setup()
    setup.finish("easy", 8)
    setup.journal.record(SourcePaused("hard"))
    assert setup.take().batch.counts == {"easy": 4, "hard": 0}
    setup.journal.record(SourcePaused("easy"))
    got = setup.handouts.claim(A, 0, 1)
    assert isinstance(got, Shortage)
    assert got.lacks == ()


def test_stale_groups_are_dropped_once_a_batch_forms_and_their_prompts_run_again() -> None:
    setup = Setup(max_staleness=1)
    setup.finish("easy", 2, version=0)
    setup.finish("hard", 2, version=0)
    setup.finish("easy", 2, version=2)
    setup.finish("hard", 2, version=2)
    setup.journal.record(VersionSet(2))
    got = setup.take()
    assert sorted(indices(got)) == [4, 5, 6, 7]
    for state in setup.ledger.sources.values():
        assert state.dropped["stale"].groups == 2
        assert [ref.prompt_index for ref in state.rerun] == [0, 1]
    event = launch(setup.journal, "easy")
    assert event is not None
    assert (event.prompt_index, event.rerun, event.group_index) == (0, True, 8)


def test_num_rollout_and_exhaustion_end_the_run_with_the_leftover_counted() -> None:
    setup = Setup(num_rollout=1)
    setup.finish("easy", 4)
    setup.finish("hard", 4)
    setup.take()
    assert setup.handouts.claim(A, 0, 1) == Finished(1, 4)

    setup = Setup(epochs=1, rows=5)
    setup.finish("easy", 5)
    setup.finish("hard", 2)
    assert isinstance(setup.mixer.outlook(), Shortage) is False
    setup.take()
    setup.finish("hard", 3)
    assert setup.take().batch.counts == {"easy": 2, "hard": 2}
    assert setup.handouts.claim(A, 0, 1) == Finished(2, 2)
