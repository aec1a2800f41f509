"""Producers that work to the plan, against fixed equal buffers and buffers in proportion to the weights.

Everything is the real thing (producers, engine pool, scripted engine, mixer, ledger) on a clock that jumps, but for
what a producer is asked for: by the plan, the counts of the coming batches; by equal buffers, the same part of the
buffer for each source, whatever its weight; by proportional buffers, its current share of the buffer. All three may
hold the same number of groups, and what the next batch lacks may be launched in all of them.

The curriculum crosses over again and again, from a source whose responses are short to one whose responses are long,
and of which a filter drops half. The trainer sets a policy version after each step, and what is older than
``max_staleness`` versions is dropped. Counted are the trainer's waiting, and the groups that were generated for
nothing: dropped as stale, or left over when the run ended. What a filter drops is no waste of theirs.

    python -m tests.campaigns.plan_comparison --steps 200
"""

from __future__ import annotations

import argparse
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import anyio
import structlog

from orchestrator.concurrency.broadcast import Broadcast
from orchestrator.core.filters import Verdict
from orchestrator.core.ledger.events import Event, Launched, LeaseAcked, VersionSet
from orchestrator.core.ledger.groups import GroupFacts, StoredGroup
from orchestrator.core.ledger.leases import LeasedBatch
from orchestrator.core.ledger.ledger import Ledger, SourceSize
from orchestrator.core.mixture.mixer import Mixer, MixerSettings
from orchestrator.core.mixture.outlook import Demand
from orchestrator.core.staleness import STALE, staleness
from orchestrator.core.weights.forms import parse_weight
from orchestrator.core.weights.table import WeightTable
from orchestrator.engines import EnginePool, SamplingParams
from orchestrator.engines.scripted import ScriptedEngine
from orchestrator.production.finisher import Finisher
from orchestrator.production.launcher import LaunchControl, Launcher
from orchestrator.production.local_runner import GroupSettings, LocalRunner
from orchestrator.production.producer import Producer
from orchestrator.production.prompt_reader import PromptReader
from orchestrator.production.scoring import Scorer
from orchestrator.production.turns import SingleTurn
from orchestrator.records import Prompt, Sample
from orchestrator.rewards import RewardResult, RewardStatistics
from tests.support.builders import MemoryJournal
from tests.support.engine_pools import running_pool
from tests.support.engine_time import JUMPING

ROWS: Final = 500


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """What the ways of asking are compared on.

    ``weights`` of the two sources; ``longest`` response of each, in tokens, and the share of its groups that a filter
    drops. ``in_flight``: requests that the engine takes at a time, ``tokens_per_s`` of each. ``length`` and ``tail``
    of its responses as of :class:`ScriptedEngine`. ``train_s``: of a step.
    """

    weights: Mapping[str, str]
    longest: Mapping[str, int]
    dropped: Mapping[str, float]
    batch_size: int = 16
    n_samples: int = 2
    lookahead: int = 3
    max_staleness: int = 3
    in_flight: int = 64
    tokens_per_s: float = 100.0
    length: tuple[int, int] = (20, 800)
    tail: float | None = None
    train_s: float = 5.0

    @property
    def buffered(self) -> int:
        """Groups that each way of asking may hold."""
        return self.lookahead * self.batch_size


PERIOD: Final = 10
CROSSING: Final = 2
"""Batches from one crossing to the next, and that one takes: 95 % easy becomes 95 % hard in two batches."""

_RISING: Final = f"min(max((step % {2 * PERIOD} - {PERIOD}) / {CROSSING}, 0.0), 1.0)"

CROSSINGS: Final = Scenario(
    weights={"easy": f"lambda step: 0.95 - 0.9 * {_RISING}", "hard": f"lambda step: 0.05 + 0.9 * {_RISING}"},
    longest={"easy": 15, "hard": 80},
    dropped={"easy": 0.0, "hard": 0.5},
    in_flight=48,
    tokens_per_s=10.0,
    length=(2, 80),
)
"""The engine takes the samples of one batch and a half at a time, so that what is produced for nothing takes the place
of something that is needed. It needs 0.6 s for a batch of easy groups and 5.5 s for one of hard ones, of which half
are dropped and which take up to 8 s each: the trainer seldom needs to wait if somebody begins with them early enough.
Tokens are few, because how many make up a second is nothing that is compared."""

Ask = Callable[[Mixer, Ledger, str], Demand]


def by_plan(mixer: Mixer, ledger: Ledger, source: str) -> Demand:
    """What the daemon does."""
    return mixer.demand(source)


def when_asked(mixer: Mixer, ledger: Ledger, source: str) -> Demand:
    """A synchronous loop: the next batch is generated when the trainer is done with the one before."""
    count = 0 if ledger.leases.batches else mixer.demand(source).next_count
    return replace(mixer.demand(source), wanted=count, next_count=count)


def _buffer(share: float, mixer: Mixer, source: str) -> Demand:
    size = mixer.lookahead * mixer.batch_size
    return replace(mixer.demand(source), wanted=round(share * size))


def by_equal_buffers(mixer: Mixer, ledger: Ledger, source: str) -> Demand:
    """The same number of groups of each source."""
    return _buffer(1 / len(ledger.sources), mixer, source)


def by_proportional_buffers(mixer: Mixer, ledger: Ledger, source: str) -> Demand:
    """As many groups as the source's weight at this step says."""
    return _buffer(mixer.table.at(ledger.step).shares[source], mixer, source)


WAYS: Final[Mapping[str, Ask]] = {
    "plan": by_plan,
    "equal buffers": by_equal_buffers,
    "proportional buffers": by_proportional_buffers,
}


@dataclass(frozen=True)
class Outcome:
    """Of one run: seconds that the trainer waited and that all took, groups by what became of them.

    ``staleness`` is the mean over the groups trained on, in policy versions.
    """

    waited_s: float
    took_s: float
    trained: int
    stale: int
    left_over: int
    staleness: float

    @property
    def wasted(self) -> int:
        """Groups generated for nothing."""
        return self.stale + self.left_over


class _Journal(MemoryJournal):
    """Notifies as the state store does."""

    def __init__(self, ledger: Ledger, changed: Broadcast, replan: Broadcast) -> None:
        super().__init__(ledger)
        self._changed, self._replan = changed, replan

    def record(self, event: Event) -> None:
        super().record(event)
        self._changed.notify()
        if not isinstance(event, Launched | LeaseAcked):
            self._replan.notify()

    def store_group(self, frame: bytes, facts: GroupFacts | None = None, prefix: bytes | None = None) -> StoredGroup:
        stored = super().store_group(frame, facts, prefix)
        self._changed.notify()
        return stored


@dataclass(frozen=True)
class _Prompts:
    """Numbered prompts, in order."""

    name: str
    epochs: int | None = None

    def __len__(self) -> int:
        return ROWS

    def row_at(self, epoch: int, position: int) -> int:
        return position

    async def read(self, prompt_index: int, epoch: int) -> Prompt:
        return Prompt(self.name, prompt_index, epoch, None, tokens=list(f"{self.name} {prompt_index}".encode()))

    async def aclose(self) -> None:
        return


class AnyReward:
    """Any number will do."""

    is_whole_group = False

    async def score(self, samples: Sequence[Sample], prompt: Prompt) -> list[RewardResult]:
        return [RewardResult(1.0) for _ in samples]

    def statistics(self) -> RewardStatistics:
        return RewardStatistics()

    async def aclose(self) -> None:
        return


class Run:
    """One way of asking, from the first step to the last."""

    reward: Any = AnyReward()

    def __init__(self, ask: Ask, scenario: Scenario, steps: int, seed: int) -> None:
        self.scenario, self.steps, self.seed = scenario, steps, seed
        weights = scenario.weights
        self.ledger = Ledger({name: SourceSize(ROWS) for name in weights}, nonce="n")
        self.changed, self.replan = Broadcast(), Broadcast()
        self.journal = _Journal(self.ledger, self.changed, self.replan)
        self.mixer = Mixer(
            ledger=self.ledger,
            journal=self.journal,
            table=WeightTable(list(weights), [parse_weight(weight) for weight in weights.values()]),
            settings=MixerSettings(
                batch_size=scenario.batch_size,
                lookahead=scenario.lookahead,
                max_staleness=scenario.max_staleness,
                num_rollout=steps,
                outstanding_bound=4 * scenario.buffered,
            ),
        )
        self.ask = ask
        self.waited_s = 0.0
        self.staleness = 0

    def _version(self) -> int:
        return self.ledger.policy_version

    def producer(self, source: str, pool: EnginePool) -> Producer:
        def verdict(samples: Sequence[Sample]) -> Verdict:
            all_launched = self.ledger.source(source).in_flight.values()
            prompt = next(launched.prompt for launched in all_launched if launched.first_sample == samples[0].index)
            draw = random.Random(f"{self.seed}/{source}/{prompt}").random()  # the same prompts, whoever asks
            return Verdict(False, "zero_std") if draw < self.scenario.dropped[source] else Verdict(True)

        log = structlog.get_logger()
        runner = LocalRunner(
            prompts=PromptReader(_Prompts(source), pool),
            turns=SingleTurn(pool),
            scorer=Scorer(self.reward),
            finisher=Finisher(verdict=verdict, journal=self.journal),
            journal=self.journal,
            policy_version=self._version,
            settings=GroupSettings(
                sampling=SamplingParams(max_new_tokens=self.scenario.longest[source]),
                sampling_header={},
                max_staleness=self.scenario.max_staleness,
            ),
            log=log,
        )
        launcher = Launcher(
            state=self.ledger.source(source),
            ledger=self.ledger,
            journal=self.journal,
            row_at=_Prompts(source).row_at,
            n_samples=self.scenario.n_samples,
        )
        control = LaunchControl(
            demand=lambda: self.ask(self.mixer, self.ledger, source), may_launch=lambda: True, replan=self.replan
        )
        return Producer(launcher=launcher, runner=runner, control=control, log=log)

    async def train(self) -> Outcome:
        """The trainer: takes a batch, works on it, sets the next policy version."""
        scenario = self.scenario
        engine = ScriptedEngine(
            name="e",
            max_in_flight=scenario.in_flight,
            seed=self.seed,
            length=scenario.length,
            tail_sigma=scenario.tail,
            tokens_per_s=scenario.tokens_per_s,
            chunk=round(4 * scenario.tokens_per_s),
        )
        async with running_pool(engine, policy_version=self._version) as pool, anyio.create_task_group() as tasks:
            for source in self.ledger.sources:
                tasks.start_soon(self.producer(source, pool).run)
            begin = anyio.current_time()
            for step in range(self.steps):
                batch = await self._next()
                self.staleness += sum(self._age(group) for share in batch.shares for group in share.groups)
                await anyio.sleep(scenario.train_s)
                self.journal.record(LeaseAcked(batch.step, 0))
                self.journal.record(VersionSet(step + 1))
            took_s = anyio.current_time() - begin
            tasks.cancel_scope.cancel()
        states = self.ledger.sources.values()
        return Outcome(
            waited_s=self.waited_s,
            took_s=took_s,
            trained=sum(state.handed_out for state in states),
            stale=sum(state.dropped[STALE].groups for state in states if STALE in state.dropped),
            left_over=sum(state.outstanding for state in states),
            staleness=self.staleness / max(1, sum(state.handed_out for state in states)),
        )

    def _age(self, group: StoredGroup) -> int:
        return staleness(self.ledger.policy_version, group.oldest_version)

    async def _next(self) -> LeasedBatch:
        begin = anyio.current_time()
        while True:
            changed = self.changed.next()
            formed = self.mixer.form(1)
            if isinstance(formed, LeasedBatch):
                self.waited_s += anyio.current_time() - begin
                return formed
            await changed.wait()


def compare(
    steps: int, seed: int, *, scenario: Scenario = CROSSINGS, ways: Mapping[str, Ask] = WAYS
) -> dict[str, Outcome]:
    """The ways on the same curriculum, one after the other."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    try:
        return {
            name: anyio.run(
                Run(ask, scenario, steps, seed).train, backend="asyncio", backend_options=dict[str, Any](JUMPING)
            )
            for name, ask in ways.items()
        }
    finally:
        structlog.reset_defaults()


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=200, help="batches of the curriculum (default: 200)")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    print(
        f"{options.steps} batches of {CROSSINGS.batch_size} groups; {CROSSINGS.buffered} groups buffered in each way\n"
    )
    print(f"{'':22}{'trainer waits':>15}{'of the time':>13}{'wasted groups':>15}{'stale':>8}{'left over':>11}")
    for name, outcome in compare(options.steps, options.seed).items():
        share = 100 * outcome.waited_s / outcome.took_s
        print(
            f"{name:22}{outcome.waited_s:>13.0f} s{share:>11.1f} %{outcome.wasted:>15}"
            f"{outcome.stale:>8}{outcome.left_over:>11}"
        )


if __name__ == "__main__":
    main()
