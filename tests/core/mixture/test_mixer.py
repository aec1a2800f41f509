"""G1, G2, G3 over whole histories: whatever the speed and the filters of the sources, the mixture is as asked for."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.core.ledger.events import SourcePaused
from orchestrator.core.ledger.leases import LeasedBatch
from orchestrator.core.mixture.outlook import Finished, Shortage
from orchestrator.core.weights.forms import parse_weight
from tests.support.daemon_process import daemon, write_config, write_prompts
from tests.support.histories import Balance, Case, History, OriginsRule, Written, origins_counts

BATCHES = 20


@pytest.mark.parametrize("seed", range(300))
def test_the_mixture_is_exact_whatever_the_speed_and_the_filters(seed: int) -> None:
    """Beside it the origin's rule under the same sources, which does not keep what is promised here."""
    case = Case.random(seed)
    history, ours = History(case), Balance(case)
    origin, theirs = OriginsRule(case), Balance(case)
    for step in range(BATCHES):
        batch = history.next_batch()
        assert batch.step == step
        groups = batch.shares[0].groups
        assert len(groups) == case.batch_size
        for name, count in batch.counts.items():
            assert sum(group.source == name for group in groups) == count >= 0
        ours.add(step, [group.source for group in groups])
        assert ours.is_exact, f"off by {float(ours.worst)} of {float(case.bound)} groups at step {step}"
        if theirs.is_exact:  # once it has failed, it has failed
            theirs.add(step, origin.next_batch())
    assert not theirs.is_exact or len(case.names) == 1, "the origin's rule keeps G1 here: this case shows nothing"
    assert_everything_is_accounted_for(history)


def assert_everything_is_accounted_for(history: History) -> None:
    """G3."""
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
        history = History(Case.random(seed, most=8))
        history.rng = random.Random(other)
        counts.append([history.next_batch().counts for _ in range(12)])
    assert counts[0] == counts[1]


def test_short_groups_are_not_preferred() -> None:
    """Bounded overtaking: a slow group is overtaken in at most `lookahead` batches, then its batch waits for it."""
    case = Case({"a": Written(1.0, lambda _: 1.0)}, {"a": 0.02}, {"a": 0.0}, {"a": 0.0}, 4, 1)
    history, most = History(case, lookahead=2), 0
    for _ in range(60):
        history.next_batch()
        most = max([most, *(flight.overtaken for flight in history.ledger.sources["a"].in_flight.values())])
    assert most == 2


# -- sources of different speed ---------------------------------------------------------------------------------------

UNEQUAL = Case(
    weights=dict.fromkeys(("slow", "middling", "fast"), Written(1.0, lambda _: 1.0)),
    speed={"slow": 0.02, "middling": 0.06, "fast": 0.2},
    drop_rate=dict.fromkeys(("slow", "middling", "fast"), 0.0),
    failure_rate=dict.fromkeys(("slow", "middling", "fast"), 0.0),
    batch_size=8,
    seed=1,
)


@pytest.mark.parametrize("size", [1, 4, 8, 32])
def test_speeds_of_1_to_3_to_10_get_a_third_each(size: int) -> None:
    """After any number of batches, to one group. By the origin's rule the slow one falls behind without end."""
    case = replace(UNEQUAL, batch_size=size)
    history, ours, origin, theirs = History(case), Balance(case), OriginsRule(case), Balance(case)
    for step in range(100):
        ours.add(step, [group.source for group in history.next_batch().shares[0].groups])
        assert ours.worst < 1
        theirs.add(step, origin.next_batch())
    assert theirs.worst > 1


def test_speeds_of_1_to_3_to_10_get_a_third_each_from_a_real_daemon(tmp_path: Path) -> None:
    names = {"slow": 100, "middling": 33, "fast": 10}
    for name in names:
        write_prompts(tmp_path / f"{name}.jsonl", 100, text=name)
    config = write_config(
        tmp_path,
        engines=[{"kind": "scripted", "tokens_per_s": 2000.0, "first_token_s": 0.0}],
        data_sources=[
            {
                "name": name,
                "prompts": {"path": f"{name}.jsonl"},
                "reward": "contains",
                "sampling": {"max_new_tokens": n},
            }
            for name, n in names.items()
        ],
        data_source_weights=[1, 1, 1],
    )
    with daemon(config) as process, process.connect() as client:
        got = dict.fromkeys(names, 0)
        for batch in range(1, 31):
            taken = client.get_batch(timeout_s=30)
            client.ack(taken.lease)
            for group in taken.groups:
                got[group.source] += 1
            assert all(abs(count - 4 * batch / 3) < 1 for count in got.values()), got


# -- the origin's defects that show in batches ------------------------------------------------------------------------


def test_defect_counts_of_the_origin_are_reproduced_by_its_rule() -> None:
    """What the other tests compare with is the origin's: its figures, as they were found."""
    assert list(origins_counts({"a": 0.3, "b": 0.3, "c": 0.3, "d": 0.1}, 5).values()) == [2, 2, 2, -1]
    assert list(origins_counts({"a": 0.95, "b": 0.05}, 8).values()) == [8, 0]
    assert list(origins_counts({"a": 0.6, "b": 0.4}, 1).values()) == [1, 0]


def test_defect_weights_governed_prompts_and_not_what_is_trained() -> None:
    """A source three times as slow, whose filter drops half, had far less of the batches than its half."""
    half = Written(0.5, lambda _: 0.5)
    case = Case({"a": half, "b": half}, {"a": 0.3, "b": 0.1}, {"a": 0.0, "b": 0.5}, {"a": 0.0, "b": 0.0}, 8, 1)
    history, origin = History(case), OriginsRule(case)
    ours = [group.source for _ in range(50) for group in history.next_batch().shares[0].groups]
    theirs = [source for _ in range(50) for source in origin.next_batch()]
    assert ours.count("b") == 200
    assert theirs.count("b") < 0.4 * 400


# -- the end of the prompts -------------------------------------------------------------------------------------------


def test_a_run_ends_whose_last_groups_have_no_weight() -> None:
    """It waited for ever: enough groups for a batch were there, of a source from which none may be taken."""
    equal = dict.fromkeys(("a", "b"), Written(1.0, lambda _: 1.0))
    none = dict.fromkeys(equal, 0.0)
    history = History(Case(equal, dict.fromkeys(equal, 1.0), none, none, 4, 1), lookahead=4)
    for name, rows in (("a", 2), ("b", 8)):
        history.ledger.sources[name].rows, history.ledger.sources[name].epochs = rows, 1
    for _ in range(3):
        history.produce()
    history.table.set("b", parse_weight(0))
    for _ in range(3):
        history.produce()
    assert {name: len(state.ready) for name, state in history.ledger.sources.items()} == {"a": 2, "b": 8}
    assert history.mixer.form(1) == Finished(0, 10)
    history.journal.record(SourcePaused("b"))
    assert isinstance(history.mixer.form(1), Shortage), "who pauses a source may let it go on"


class Told:
    """A batch observer that keeps what it is told, and how the ledger was at that moment."""

    def __init__(self) -> None:
        self.batches: list[tuple[LeasedBatch, int, bool]] = []
        self.history: History | None = None

    def batch_formed(self, batch: LeasedBatch) -> None:
        assert self.history is not None
        ledger = self.history.ledger
        self.batches.append((batch, ledger.step, batch is ledger.leases.batches.get(batch.step)))


def test_the_observer_is_told_of_each_batch_once_when_it_is_leased_and_the_step_has_advanced() -> None:
    told = Told()
    told.history = history = History(Case.random(3), observer=told)
    formed = [history.next_batch() for _ in range(5)]
    assert [batch for batch, _, _ in told.batches] == formed
    assert [step for _, step, _ in told.batches] == [1, 2, 3, 4, 5]
    assert all(is_leased for _, _, is_leased in told.batches)


# -- producers follow the filter --------------------------------------------------------------------------------------


def test_a_source_that_drops_half_launches_twice_as_much_within_the_bound() -> None:
    half = Written(0.5, lambda _: 0.5)
    case = Case({"a": half, "b": half}, {"a": 0.3, "b": 0.3}, {"a": 0.0, "b": 0.5}, {"a": 0.0, "b": 0.0}, 32, 1)
    history = History(case)
    for _ in range(40):
        history.next_batch()
        assert history.ledger.outstanding <= history.mixer.outstanding_bound
    a, b = history.ledger.sources.values()
    assert a.handed_out == b.handed_out == 20 * 32
    assert b.launched / a.launched == pytest.approx(2.0, abs=0.15)
    assert len(b.in_flight) > len(a.in_flight), "more is under way already, not launched one after the other"
