"""Whole histories of batches, drawn at random: schedules, speeds, filters, failures.

:class:`History` has the real mixer, plan and ledger; what producers and their engines would do is drawn.
:class:`OriginsRule` is the rule of the format's origin under the same sources: weights decide what is launched, a call
at a time, and a batch is whatever finishes first.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from orchestrator.core.ledger.events import Dropped, Launched
from orchestrator.core.ledger.groups import InFlight
from orchestrator.core.ledger.leases import LeasedBatch
from orchestrator.core.ledger.ledger import Ledger, SourceSize
from orchestrator.core.mixture.mixer import BatchObserver, Mixer, MixerSettings
from orchestrator.core.mixture.outlook import Shortage
from orchestrator.core.mixture.plan import launches
from orchestrator.core.statistics import Acceptance
from orchestrator.core.weights.forms import parse_weight
from orchestrator.core.weights.table import WeightTable
from tests.support.builders import MemoryJournal, frame_for, launch

ROWS = 1000
PATIENT_TURNS = 5000

Schedule = Callable[[int], float]


@dataclass(frozen=True)
class Written:
    """A weight as a config has it, and what it promises."""

    text: float | str
    means: Schedule


def random_weight(rng: random.Random) -> Written:
    """One of the kinds of schedule, with figures of its own."""
    a, b = round(rng.uniform(0.01, 1), 3), round(rng.uniform(0.01, 1), 3)
    length = rng.randint(2, 25)
    return rng.choice(
        [
            Written(a, lambda _: a),
            Written(round(a / 20, 4), lambda _: round(a / 20, 4)),
            Written(
                f"lambda step: {a} + ({b} - {a}) * min(step / {length}, 1.0)",
                lambda step: a + (b - a) * min(step / length, 1.0),
            ),
            Written(f"lambda step: {a} if step % {length} < {length // 2} else 0",
                    lambda step: a if step % length < length // 2 else 0.0),
            Written(f"lambda step: {a} * exp(-{b} * step) + 0.01", lambda step: a * math.exp(-b * step) + 0.01),
            Written(f"lambda step: {a} if step < {length} else {b}", lambda step: a if step < length else b),
            Written("orchestrator.weight_scheduler.exponential_warmup",
                    lambda step: 1.0 - (0.9 * math.exp(-0.015 * step) + 0.1)),
        ]
    )  # fmt: skip


@dataclass(frozen=True)
class Case:
    """Sources and how they behave, by name; rates are shares of the groups that finish, speeds the share of the groups
    in flight that finish in one turn."""

    weights: dict[str, Written]
    speed: dict[str, float]
    drop_rate: dict[str, float]
    failure_rate: dict[str, float]
    batch_size: int
    seed: int

    @classmethod
    def random(cls, seed: int, *, most: int = 16) -> Case:
        rng = random.Random(seed)
        names = [f"s{i}" for i in range(rng.randint(1, most))]
        weights = {name: random_weight(rng) for name in names}
        weights[names[0]] = Written(0.2, lambda _: 0.2)  # at every step something has a weight
        return cls(
            weights,
            {name: rng.choice([0.02, 0.1, 1.0]) for name in names},
            {name: rng.choice([0.0, 0.0, 0.5, 0.9]) for name in names},
            {name: rng.choice([0.0, 0.0, 0.0, 0.3]) for name in names},
            rng.choice([1, 5, 8, 32]),
            seed,
        )

    @property
    def names(self) -> list[str]:
        return list(self.weights)

    def owed(self, step: int) -> dict[str, Fraction]:
        """Groups that a batch owes to each source, exactly: batch size x normalised weight."""
        row = {name: Fraction(weight.means(step)) for name, weight in self.weights.items()}
        return {name: self.batch_size * weight / sum(row.values()) for name, weight in row.items()}

    @property
    def bound(self) -> Fraction:
        """How far a source may be from what it is owed: below 1 for 2 and 3 sources, at most max(1.5, H_n - 1).

        The millionth is for weights that our own exact fractions and the expressions round differently."""
        n = len(self.weights)
        harmonic = sum((Fraction(1, k) for k in range(2, n + 1)), Fraction(0))
        return (Fraction(1) if n <= 3 else max(Fraction(3, 2), harmonic)) + Fraction(1, 10**6)


def launched(flight: InFlight) -> Launched:
    """The event that put a group in flight."""
    ref = flight.prompt
    return Launched(flight.source, flight.group_index, flight.first_sample, flight.n, ref.prompt_index, ref.epoch)


class History:
    """The real mixer under the sources of a case.

    Args:
        case: the sources.
        samples: of a group.
        pass_rate: by source: rewards are then drawn, and groups whose rewards are all equal are dropped.
        kind: of the mixer.
        observer: told of the batches.
    """

    def __init__(
        self,
        case: Case,
        *,
        lookahead: int = 2,
        samples: int = 1,
        pass_rate: Mapping[str, float] | None = None,
        kind: type[Mixer] = Mixer,
        observer: BatchObserver | None = None,
    ) -> None:
        self.case = case
        self.samples = samples
        self.pass_rate = dict(pass_rate or {})
        self.rng = random.Random(case.seed)
        self.ledger = Ledger({name: SourceSize(ROWS) for name in case.names}, nonce="n")
        weights = [parse_weight(weight.text) for weight in case.weights.values()]
        self.table = WeightTable(case.names, weights, self.ledger.statistics)
        self.journal = MemoryJournal(self.ledger)
        self.mixer = kind(
            ledger=self.ledger,
            journal=self.journal,
            table=self.table,
            settings=MixerSettings(
                batch_size=case.batch_size, lookahead=lookahead, outstanding_bound=4 * lookahead * case.batch_size
            ),
            observer=observer,
        )
        self.acceptance = {name: Acceptance() for name in case.names}
        self.speed = dict(case.speed)
        self.turn = 0
        self.handed_out: list[int] = []
        self._ends: list[tuple[int, int, str]] = []  # turn, group, source: a heap
        self._stirred = set(case.names)
        self._planned_about: Any = None

    def produce(self) -> None:
        """One turn of all producers and engines."""
        for name in self._asked():
            self._launch(name)
        while self._ends and self._ends[0][0] <= self.turn:
            _, index, name = heapq.heappop(self._ends)
            self.finish(name, index)
        self.turn += 1

    def _asked(self) -> list[str]:
        """The sources whose producers have something to do: of which a group has ended, or all, as it is in the daemon
        when the plan may have changed."""
        about = (self.ledger.plan_revision, self.table.revision, self.mixer.is_borrowing)
        if about != self._planned_about or self.mixer.is_borrowing:
            self._planned_about = about
            self._stirred.update(self.case.names)
        asked = [name for name in self.case.names if name in self._stirred]
        self._stirred.clear()
        return asked

    def _launch(self, name: str) -> None:
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
            event = launch(self.journal, name, n=self.samples, rows=ROWS)
            if event is None:
                break
            self._draw_end(name, event.group_index)
        if order.count:
            assert state.outstanding <= max(demand.bound, demand.next_count), "bounds act at launch"

    def _draw_end(self, name: str, index: int) -> None:
        """In each turn the group ends with the chance of its source's speed: drawn at once, not turn by turn."""
        if speed := self.speed[name]:
            turns = 0 if speed == 1.0 else int(math.log(1.0 - self.rng.random()) / math.log(1.0 - speed))
            heapq.heappush(self._ends, (self.turn + turns, index, name))

    def set_speed(self, **speed: float) -> None:
        """From now on; also of what is in flight."""
        self.speed |= speed
        self._ends = [end for end in self._ends if end[2] not in speed]
        heapq.heapify(self._ends)
        for name in speed:
            for index in self.ledger.sources[name].in_flight:
                self._draw_end(name, index)

    def finish(self, name: str, index: int) -> None:
        """A group ends: fails, is filtered, or is buffered."""
        self._stirred.add(name)
        if self.rng.random() < self.case.failure_rate[name]:
            self.journal.record(Dropped(name, index, "failed", [], False))
            self._stirred.update(self.case.names)
            return
        kept = self.rng.random() >= self.case.drop_rate[name]
        rewards = [1.0] * self.samples
        if name in self.pass_rate:
            rewards = [float(self.rng.random() < self.pass_rate[name]) for _ in range(self.samples)]
            kept = min(rewards) < max(rewards)
        self.acceptance[name].add(kept)
        if kept:
            flight = self.ledger.sources[name].in_flight[index]
            event = launched(flight)
            self.journal.store_group(frame_for(event, lengths=(self.rng.randint(1, 5),) * flight.n, rewards=rewards))
        else:
            self.journal.record(Dropped(name, index, "zero_std", [1] * self.samples, False, rewards))
            self._stirred.update(self.case.names)

    def next_batch(self) -> LeasedBatch:
        """Produce until the next batch can be formed."""
        for _ in range(PATIENT_TURNS):
            formed = self.mixer.form(1)
            if isinstance(formed, LeasedBatch):
                self.handed_out += [group.group_index for group in formed.shares[0].groups]
                return formed
            assert isinstance(formed, Shortage)
            self.produce()
            if not self._stirred and self._ends:  # nothing happens until then
                self.turn = max(self.turn, self._ends[0][0])
        raise AssertionError(f"no batch at step {self.ledger.step}: {formed}")


@dataclass
class Balance:
    """What each source got against what it was owed, batch by batch."""

    case: Case
    owed: dict[str, Fraction] = field(default_factory=dict)
    got: Counter[str] = field(default_factory=Counter)
    worst: Fraction = Fraction(0)

    def add(self, step: int, sources: Sequence[str]) -> None:
        """A batch of groups of these sources."""
        for name, groups in self.case.owed(step).items():
            self.owed[name] = self.owed.get(name, Fraction(0)) + groups
        self.got.update(sources)
        self.worst = max(self.worst, *(abs(self.got[name] - self.owed[name]) for name in self.case.names))

    @property
    def is_exact(self) -> bool:
        """G1 so far."""
        return self.worst < self.case.bound


def origins_counts(shares: Mapping[str, float], size: int) -> dict[str, int]:
    """Each share of the size rounded by itself; the last source gets the rest, below zero if need be."""
    *first, last = shares
    counts = {name: round(size * shares[name]) for name in first}
    return {**counts, last: size - sum(counts.values())}


class OriginsRule:
    """The origin's rule; see the module's docstring.

    Each call launches a batch of prompts by the weights of that call's number, which is the origin's step. Filtered and
    failed groups make further calls. A batch is the first groups that finish; the rest goes on afterwards.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self.rng = random.Random(case.seed)
        self.calls = 0
        self.flying: Counter[str] = Counter()

    def _launch(self) -> None:
        row = {name: weight.means(self.calls) for name, weight in self.case.weights.items()}
        total = sum(row.values())
        self.calls += 1
        for name, count in origins_counts({n: w / total for n, w in row.items()}, self.case.batch_size).items():
            self.flying[name] += max(0, count)

    def next_batch(self) -> list[str]:
        """The sources of the groups of the next batch."""
        case, batch = self.case, list[str]()
        for _ in range(PATIENT_TURNS):
            while len(batch) + self.flying.total() < case.batch_size:
                self._launch()
            finished = [n for n in case.names for _ in range(self.flying[n]) if self.rng.random() < case.speed[n]]
            self.flying.subtract(finished)
            for name in finished:
                ends = self.rng.random() < case.failure_rate[name] or self.rng.random() < case.drop_rate[name]
                if not ends and len(batch) < case.batch_size:
                    batch.append(name)
            if len(batch) == case.batch_size:
                return batch
        raise AssertionError("the origin's rule gets no batch")
