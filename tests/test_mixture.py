"""G1, G2, G3 over whole histories: whatever the speed and the filters of the sources, the mixture is the one asked for.

The mixer, the plan and the ledger are the real ones; what producers and their engines would do is drawn at random.
"""

from __future__ import annotations

import random
from fractions import Fraction

import pytest

from orchestrator.buffer import InFlight
from orchestrator.events import Dropped, Launched
from orchestrator.leases import LeasedBatch
from orchestrator.ledger import Ledger, SourceSize
from orchestrator.mixer import Mixer, Shortage
from orchestrator.plan import launches
from orchestrator.statistics import Acceptance
from orchestrator.weights import WeightTable, parse_weight

from .builders import MemoryJournal, frame_for, launch

SCHEDULES = [
    "0.3",
    "0.05",
    "lambda step: 0.9 - 0.8 * min(step / 20, 1.0)",
    "lambda step: 0.1 + 0.8 * min(step / 20, 1.0)",
    "lambda step: 1 if step % 7 < 3 else 0",
    "lambda step: exp(-0.1 * step) + 0.01",
    "orchestrator.weight_scheduler.exponential_decay",
]


def launched(flight: InFlight) -> Launched:
    """The event that put a group in flight."""
    ref = flight.prompt
    return Launched(flight.source, flight.group_index, flight.first_sample, flight.n, ref.prompt_index, ref.epoch)


class History:
    """Sources of random speed and filter rate under a real mixer."""

    def __init__(self, seed: int, *, lookahead: int = 2) -> None:
        self.rng = random.Random(seed)
        n = self.rng.randint(1, 8)
        self.names = [f"s{i}" for i in range(n)]
        self.batch_size = self.rng.choice([1, 5, 8, 32])
        weights = [parse_weight("0.2"), *(parse_weight(self.rng.choice(SCHEDULES)) for _ in range(n - 1))]
        self.table = WeightTable(self.names, weights)
        self.ledger = Ledger({name: SourceSize(1000) for name in self.names}, nonce="n")
        self.journal = MemoryJournal(self.ledger)
        self.mixer = Mixer(
            ledger=self.ledger,
            journal=self.journal,
            table=self.table,
            batch_size=self.batch_size,
            lookahead=lookahead,
            max_staleness=None,
            num_rollout=None,
            outstanding_bound=4 * lookahead * self.batch_size,
            buffer_bounds={},
        )
        self.speed = {name: self.rng.choice([0.02, 0.1, 1.0]) for name in self.names}
        self.drop_rate = {name: self.rng.choice([0.0, 0.0, 0.5, 0.9]) for name in self.names}
        self.acceptance = {name: Acceptance() for name in self.names}
        self.handed_out: list[int] = []

    def produce(self) -> None:
        """One turn of all producers and engines."""
        for name in self.names:
            state, demand = self.ledger.sources[name], self.mixer.demand(name)
            order = launches(
                wanted=demand.wanted,
                next_count=demand.next_count,
                buffered=len(state.ready),
                in_flight=len(state.in_flight),
                acceptance=self.acceptance[name].value,
                bound=demand.bound,
            )
            for _ in range(order.count):
                launch(self.journal, name, n=1, rows=1000)
            if order.count:
                assert state.outstanding <= max(demand.bound, demand.next_count), "bounds act at launch"
            for flight in list(state.in_flight.values()):
                if self.rng.random() < self.speed[name]:
                    self.finish(name, flight.group_index)

    def finish(self, name: str, index: int) -> None:
        kept = self.rng.random() >= self.drop_rate[name]
        self.acceptance[name].add(kept)
        if kept:
            flight = self.ledger.sources[name].in_flight[index]
            event = launched(flight)
            self.journal.store_group(frame_for(event, lengths=(self.rng.randint(1, 5),) * flight.n))
        else:
            self.journal.record(Dropped(name, index, "zero_std", [1], False))

    def next_batch(self) -> LeasedBatch:
        for _ in range(5000):
            formed = self.mixer.form(1)
            if isinstance(formed, LeasedBatch):
                self.handed_out += [group.group_index for group in formed.shares[0].groups]
                return formed
            assert isinstance(formed, Shortage)
            self.produce()
        raise AssertionError(f"no batch at step {self.ledger.step}: {formed}")


@pytest.mark.parametrize("seed", range(40))
def test_the_mixture_is_exact_whatever_the_speed_and_the_filters(seed: int) -> None:
    history = History(seed)
    n = len(history.names)
    asked = dict.fromkeys(history.names, Fraction(0))
    got = dict.fromkeys(history.names, 0)
    bound = 1 if n <= 3 else max(Fraction(3, 2), sum(Fraction(1, k) for k in range(2, n + 1)))
    for step in range(25):
        batch = history.next_batch()
        assert batch.step == step
        total = sum(Fraction(weight) for weight in batch.weights.values())
        groups = batch.shares[0].groups
        assert len(groups) == history.batch_size
        for name in history.names:
            asked[name] += history.batch_size * Fraction(batch.weights[name]) / total
            mine = [group for group in groups if group.source == name]
            assert len(mine) == batch.counts[name] >= 0
            got[name] += len(mine)
            assert abs(got[name] - asked[name]) < bound + Fraction(1, 10**6)
    assert len(set(history.handed_out)) == len(history.handed_out)
    for state in history.ledger.sources.values():
        dropped = sum(count.groups for count in state.dropped.values())
        assert state.launched == state.outstanding + state.handed_out + dropped
    everywhere = sum(state.launched for state in history.ledger.sources.values())
    assert everywhere == history.ledger.next_group, "indices are consecutive over all sources"


@pytest.mark.parametrize("seed", range(6))
def test_same_seed_same_counts_whatever_the_speed(seed: int) -> None:
    """G12: the counts are a function of config and seed; finishing in another order does not change them."""
    counts = []
    for other in (1, 2):
        history = History(seed)
        history.rng = random.Random(other)
        counts.append([history.next_batch().counts for _ in range(12)])
    assert counts[0] == counts[1]


def test_short_groups_are_not_preferred() -> None:
    """Bounded overtaking: a slow group is overtaken in at most `lookahead` batches, then its batch waits for it."""
    history = History(0, lookahead=2)
    for _ in range(30):
        history.next_batch()
        for state in history.ledger.sources.values():
            assert all(flight.overtaken <= 2 for flight in state.in_flight.values())
