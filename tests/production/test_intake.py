"""A source without a producer: groups come from outside, and the mixture is as exact as with one."""

from __future__ import annotations

from array import array
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.lowlevel
import pytest
import structlog

from orchestrator.concurrency.broadcast import Broadcast
from orchestrator.core.filters import Verdict
from orchestrator.core.ledger.events import LeaseAcked, SourcePaused, SourceResumed
from orchestrator.core.ledger.leases import LeasedBatch
from orchestrator.core.ledger.ledger import Ledger, SourceSize
from orchestrator.core.mixture.mixer import Mixer, MixerSettings
from orchestrator.core.mixture.outlook import Shortage
from orchestrator.core.weights.forms import parse_weight
from orchestrator.core.weights.table import WeightTable
from orchestrator.errors import BadRequest
from orchestrator.frames import GroupFrame
from orchestrator.production.finisher import Finisher
from orchestrator.production.group_source import GroupSource
from orchestrator.production.intake import OUTSIDE, Intake, OutsideGroup, SourceFull
from orchestrator.production.launcher import LaunchControl, Launcher
from orchestrator.production.producers import Producers
from orchestrator.production.runner import GroupOutcome
from orchestrator.records import Prompt, Sample
from tests.support.builders import MemoryJournal, frame_for, launch, make_sample

DEADLINE_S = 30.0
"""Only a test that hangs meets it."""

N = 2
SIZES = {"own": SourceSize(1000), "pushed": OUTSIDE}
BATCH = 4


class Scene:
    """The real ledger and mixer, a source with prompts of its own, and one that is filled from outside."""

    def __init__(self, ledger: Ledger | None = None, *, bound: int = 64) -> None:
        self.ledger = ledger or Ledger(SIZES, nonce="n")
        self.journal = MemoryJournal(self.ledger)
        weights = WeightTable(list(SIZES), [parse_weight(0.5), parse_weight("lambda step: 0.25 + step / 40")])
        self.mixer = Mixer(
            ledger=self.ledger,
            journal=self.journal,
            table=weights,
            settings=MixerSettings(batch_size=BATCH, lookahead=2, outstanding_bound=bound),
        )
        self.is_congested = False
        self.intake = Intake(
            launcher=Launcher(
                state=self.ledger.source("pushed"),
                ledger=self.ledger,
                journal=self.journal,
                row_at=lambda _epoch, position: position,
                n_samples=N,
            ),
            control=LaunchControl(
                demand=lambda: self.mixer.demand("pushed"),
                may_launch=lambda: not self.is_congested,
                replan=Broadcast(),
            ),
            finisher=Finisher(verdict=self._verdict, journal=self.journal),
            log=structlog.get_logger(),
        )

    def _verdict(self, samples: Sequence[Sample]) -> Verdict:
        return Verdict(False, "zero_std") if all(sample.reward == 0 for sample in samples) else Verdict(True)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Intake]:
        """The intake as the daemon runs it, beside any producers; it takes groups in the body."""
        sources: dict[str, GroupSource] = {"pushed": self.intake}
        producers = Producers(sources, structlog.get_logger())
        async with anyio.create_task_group() as tasks:
            with anyio.fail_after(DEADLINE_S):
                await tasks.start(producers.run)
                while not self.intake.statistics().is_launching:
                    await anyio.lowlevel.checkpoint()
            yield self.intake
            with anyio.fail_after(DEADLINE_S):
                await producers.stop()
            tasks.cancel_scope.cancel()

    def kinds(self) -> list[str]:
        return [kind if kind != "event" else body.split(b'"')[3].decode() for kind, body in self.journal.records]


def outside(reward: float = 1.0, *, n: int = N, **changes: Any) -> OutsideGroup:
    """A group as somebody else would number it."""
    samples = [make_sample(900 + slot, length=3 + slot, reward=reward) for slot in range(n)]
    prompt = Prompt("whoever", 77, 3, "what?", label="x")
    return OutsideGroup(**{"prompt": prompt, "prompt_tokens": array("i", [1, 2]), "samples": samples} | changes)


async def test_batches_are_exact_whatever_fills_a_source() -> None:
    scene, given = Scene(), dict.fromkeys(SIZES, 0.0)
    handed = dict.fromkeys(SIZES, 0)
    seen: list[int] = []
    async with scene.running() as intake:
        for step in range(30):
            while not isinstance(batch := scene.mixer.form(1), LeasedBatch):
                assert isinstance(batch, Shortage)
                for lack in batch.lacks:
                    if lack.source == "pushed":
                        intake.push(outside())
                    else:
                        event = launch(scene.journal, "own", n=N, rows=1000)
                        assert event is not None
                        scene.journal.store_group(frame_for(event))
            weights = {"own": 0.5, "pushed": 0.25 + step / 40}
            for name, weight in weights.items():
                given[name] += BATCH * weight / sum(weights.values())
                groups = [group for share in batch.shares for group in share.groups if group.source == name]
                handed[name] += len(groups)
                assert abs(handed[name] - given[name]) < 1
                seen += [group.group_index for group in groups]
            scene.journal.record(LeaseAcked(batch.step, 0))
    assert sorted(seen) == list(range(len(seen))), "no index is missing and none comes twice"
    assert handed["pushed"] > 30
    replayed = scene.journal.replayed(SIZES)
    assert replayed.snapshot() == scene.ledger.snapshot()


async def test_the_journal_sees_what_it_sees_of_a_producer() -> None:
    scene = Scene()
    async with scene.running() as intake:
        first = intake.push(outside())
        assert (first.group_index, first.outcome) == (0, GroupOutcome.BUFFERED)
        assert intake.push(outside(reward=0.0)).outcome is GroupOutcome.FILTERED
        hostile = outside(prompt=Prompt("s", 0, 0, "x", metadata={"set": {1}}))
        third = intake.push(hostile)
        assert third.outcome is GroupOutcome.FAILED
        assert "cannot be stored" in str(third.failure)
    assert scene.kinds() == ["launched", "group", "launched", "dropped", "launched", "dropped"]
    frame = GroupFrame(next(body for kind, body in scene.journal.records if kind == "group")).header
    assert (frame["source"], frame["group_index"], frame["prompt_index"], frame["epoch"]) == ("pushed", 0, 0, 0)
    assert [sample["index"] for sample in frame["samples"]] == [0, 1]
    assert (frame["prompt"], frame["label"]) == ("what?", "x")
    dropped = {reason: count.groups for reason, count in scene.ledger.source("pushed").dropped.items()}
    assert dropped == {"zero_std": 1, "too_large": 1}
    assert intake.statistics().last_failure == third.failure
    assert intake.statistics().acceptance < 1


async def test_what_is_refused_leaves_no_trace() -> None:
    scene = Scene(bound=2)
    with pytest.raises(SourceFull, match="stopped"):
        scene.intake.push(outside())
    async with scene.running() as intake:
        unfinished = outside()
        unfinished.samples[1].reward = None
        for bad, why in ((outside(n=3), "2 samples, but this one has 3"), (unfinished, "sample 1 is completed; every")):
            with pytest.raises(BadRequest, match=why):
                intake.push(bad)
        scene.journal.record(SourcePaused("pushed"))
        with pytest.raises(SourceFull, match="paused"):
            intake.push(outside())
        scene.journal.record(SourceResumed("pushed"))
        scene.is_congested = True
        with pytest.raises(SourceFull):
            intake.launch()
        scene.is_congested = False
        bound = scene.mixer.demand("pushed").bound
        for _ in range(bound):
            intake.push(outside())
        before = list(scene.journal.records)
        with pytest.raises(SourceFull, match=f"{bound} groups in flight and buffered; at most {bound} are allowed"):
            intake.push(outside())
        assert scene.journal.records == before


async def test_a_group_may_be_opened_and_finished_later() -> None:
    scene = Scene()
    async with scene.running() as intake:
        first, second = intake.launch(), intake.launch()
        assert (first.first_sample, second.first_sample) == (0, N)
        assert intake.put(second.group_index, outside()).outcome is GroupOutcome.BUFFERED
        intake.give_up(first.group_index, "agent_crashed")
        for gone in (first, second):
            with pytest.raises(BadRequest, match=f"no open group {gone.group_index}"):
                intake.put(gone.group_index, outside())
        state = scene.ledger.source("pushed")
        assert (len(state.ready), len(state.in_flight), state.dropped["agent_crashed"].groups) == (1, 0, 1)


async def test_groups_that_were_open_when_the_source_stopped_are_counted() -> None:
    scene = Scene()
    async with scene.running() as intake:
        left = intake.launch()
    with pytest.raises(BadRequest, match="no open group"):
        scene.intake.put(left.group_index, outside())
    again = Scene(scene.journal.replayed(SIZES))
    assert list(again.ledger.source("pushed").in_flight) == [left.group_index]
    async with again.running() as intake:
        assert not again.ledger.source("pushed").in_flight
        assert again.ledger.source("pushed").dropped["abandoned"].groups == 1
        assert intake.push(outside()).group_index == left.group_index + 1
