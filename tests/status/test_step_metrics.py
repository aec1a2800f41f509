"""The figures of a step: the same numbers nested, slashed and as a point of the page, whatever a source has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.core.ledger.events import Dropped
from orchestrator.core.ledger.leases import LeasedBatch
from orchestrator.core.ledger.ledger import Ledger, SourceSize
from orchestrator.core.mixture.mixer import Mixer, MixerSettings
from orchestrator.core.weights.forms import parse_weight
from orchestrator.core.weights.table import WeightTable
from orchestrator.status import StepMetrics, report_point, step_point
from tests.support.builders import MemoryJournal, frame_for, launch

NAMES = ("easy", "hard")
SIZE = 4


class Run:
    """A ledger and a mixer, of which every step has a cap or none, and some groups that are dropped."""

    def __init__(self) -> None:
        ledger = Ledger({name: SourceSize(10) for name in NAMES}, nonce="n")
        self._journal = MemoryJournal(ledger)
        self._caps: dict[int, float] = {}
        self._mixer = Mixer(
            ledger=ledger,
            journal=self._journal,
            table=WeightTable(NAMES, [parse_weight(0.75), parse_weight(0.25)]),
            settings=MixerSettings(batch_size=SIZE, lookahead=1, outstanding_bound=8),
        )
        self.metrics = StepMetrics(ledger, lambda _, step: self._caps.get(step))

    def step(self, *, cap: float | None = None, dropped: tuple[str, ...] = ()) -> LeasedBatch:
        for reason in dropped:
            event = launch(self._journal, "easy")
            assert event is not None
            self._journal.record(Dropped("easy", event.group_index, reason, [3, 3], rerun=False))
        planned = self._mixer.plan()[0]
        if cap is not None:
            self._caps[planned.step] = cap
        for name, count in planned.counts.items():
            for _ in range(count):
                event = launch(self._journal, name)
                assert event is not None
                self._journal.store_group(frame_for(event, lengths=(3, 6), rewards=(0.0, 1.0)))
        batch = self._mixer.form(1)
        assert isinstance(batch, LeasedBatch)
        return batch


def flat(prefix: str, metrics: Mapping[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    for key, value in metrics.items():
        found |= flat(f"{prefix}/{key}", value) if isinstance(value, dict) else {f"{prefix}/{key}": value}
    return found


def test_slashed_names_are_those_of_the_nested_figures_whatever_a_step_has() -> None:
    """A cap that goes while a reason comes leaves as many figures as before, and under other names."""
    run = Run()
    for facts in ({}, {"cap": 0.5}, {"dropped": ("zero_std",)}, {"dropped": ("stale",)}, {"cap": 0.5}):
        report = run.metrics.report(run.step(**facts), trainer_wait_s=1.5)
        expected = {"rollout/trainer_wait_s": 1.5}
        for name in NAMES:
            expected |= flat(f"rollout/{name}", report.sources[name])
        assert report.slashed == expected
        assert ("rollout/easy/reward_cap" in report.slashed) == ("cap" in facts)


def test_the_figures_are_of_the_batch_and_of_the_time_since_the_one_before() -> None:
    run = Run()
    run.step()
    report = run.metrics.report(run.step(dropped=("zero_std", "reward_cap", "zero_std")))
    easy, hard = (report.sources[name] for name in NAMES)
    assert (easy["group_count"], hard["group_count"], easy["sample_count"]) == (3, 1, 6)
    assert easy["response_len"] == {"mean": 4.5, "median": 4.5, "max": 6.0, "min": 3.0, "std": 1.5}
    assert easy["raw_reward"] == {"mean": 0.5, "median": 0.5, "max": 1.0, "min": 0.0, "std": 0.5}
    assert (easy["dropped"], hard["dropped"]) == ({"zero_std": 2, "reward_cap": 1}, {})
    assert easy["filter_ratio_all_zero"] == 2 / 9
    assert run.metrics.report(run.step()).sources["easy"]["dropped"] == {"zero_std": 0, "reward_cap": 0}


def test_a_point_is_the_same_live_and_read_back() -> None:
    run = Run()
    report = run.metrics.report(run.step(cap=0.5, dropped=("zero_std", "a/b")), trainer_wait_s=2.0)
    live = report_point(report, 12.5)
    assert live == step_point(report.step, report.policy_version, 12.5, report.slashed)
    assert live["wait_s"] == 2.0
    assert live["sources"]["easy"][-1] == 2
