"""``starvation: {policy: borrow}``: who stands in, what is owed for it, how it is paid back, and that all is told."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.core.ledger.events import SourcePaused, SourceResumed, decode_event, encode_event
from orchestrator.core.ledger.leases import LeasedBatch
from orchestrator.core.ledger.ledger import Ledger, SourceSize
from orchestrator.core.mixture.borrowing import REPAID_PER_BATCH, Loan, repay, stand_in
from orchestrator.core.mixture.outlook import Shortage
from orchestrator.core.weights.forms import parse_weight
from orchestrator.errors import BatchTimeout
from tests.support.daemon_process import daemon, write_config
from tests.support.histories import ROWS, Case, History, Written

NAMES = ("a", "b", "c")
EQUAL = {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}


def loan(
    counts: tuple[int, int, int], takeable: tuple[int, int, int], debt: dict[str, int] | None = None, **options: object
) -> Loan | str:
    arguments = {"limits": {}, "size": sum(counts)} | options
    return stand_in(
        dict(zip(NAMES, counts, strict=True)),
        EQUAL,
        takeable=dict(zip(NAMES, takeable, strict=True)),
        debt=debt or {},
        **arguments,  # type: ignore[arg-type]
    )


# -- who stands in ----------------------------------------------------------------------------------------------------


def test_others_give_in_proportion_to_their_shares_and_it_is_booked() -> None:
    assert loan((4, 4, 4), (0, 9, 9)) == Loan({"a": 0, "b": 6, "c": 6}, {"a": 4, "b": -2, "c": -2}, is_there=True)
    assert loan((4, 4, 4), (1, 9, 4)) == Loan({"a": 1, "b": 7, "c": 4}, {"a": 3, "b": -3, "c": 0}, is_there=True)


def test_those_who_have_too_little_yet_are_asked_for_more() -> None:
    assert loan((4, 4, 4), (0, 4, 4)) == Loan({"a": 0, "b": 6, "c": 6}, {"a": 4, "b": -2, "c": -2}, is_there=False)


def test_a_source_that_is_short_itself_lends_nothing() -> None:
    assert loan((4, 4, 4), (0, 3, 9)) == Loan({"a": 0, "b": 3, "c": 9}, {"a": 4, "b": 1, "c": -5}, is_there=True)
    assert loan((4, 4, 4), (0, 3, 2)) == "no other source with a weight can fill in"


def test_an_exhausted_source_lends_what_it_has_left() -> None:
    got = loan((4, 4, 4), (0, 5, 4), limits={"b": 5, "c": 4})
    assert got == "no other source with a weight can fill in"
    got = loan((4, 4, 4), (1, 5, 4), limits={"b": 5})
    assert got == Loan({"a": 1, "b": 5, "c": 6}, {"a": 3, "b": -1, "c": -2}, is_there=False)


def test_debt_is_one_batch_at_most() -> None:
    assert isinstance(loan((4, 4, 4), (0, 9, 9), {"a": 8, "b": -8}), Loan)
    assert loan((4, 4, 4), (0, 9, 9), {"a": 5, "b": 4, "c": -9}) == (
        "other sources may owe at most one batch, and 9 of 12 groups are not paid back yet"
    )


def test_nothing_is_borrowed_where_nothing_is_missing() -> None:
    assert loan((4, 4, 4), (4, 9, 9)) == Loan({"a": 4, "b": 4, "c": 4}, {}, is_there=True)


# -- paying back ------------------------------------------------------------------------------------------------------

debts = st.lists(st.integers(-40, 40), min_size=2, max_size=8).map(lambda some: [*some, -sum(some)])


@given(debts, st.integers(1, 64), st.data())
def test_paying_back_keeps_what_is_owed_and_is_slow(groups: list[int], size: int, data: st.DataObject) -> None:
    names = [f"s{i}" for i in range(len(groups))]
    debt = dict(zip(names, map(float, groups), strict=True))
    weights = data.draw(st.lists(st.sampled_from([0, 0.01, 0.3, 1]), min_size=len(names), max_size=len(names)))
    shares = {name: weight / max(1, sum(weights)) for name, weight in zip(names, weights, strict=True)}
    carry, rest = repay(dict.fromkeys(names, 0.5), debt, shares, size)
    moved = sum(abs(rest[name] - debt[name]) for name in names) / 2
    assert sum(rest.values()) == 0
    assert moved <= max(1, size * REPAID_PER_BATCH)
    for name in names:
        assert carry[name] + rest[name] == 0.5 + debt[name], "what a source is owed in all stays the same"
        assert abs(rest[name]) <= abs(debt[name])
        assert 0.5 - carry[name] <= size * shares[name], "none gives more than its share of a batch"
        assert shares[name] or rest[name] == debt[name]
    both = {debt[name] > 0 for name in names if debt[name] and shares[name]}
    assert moved > 0 or len(both) < 2, "something is paid back whenever it can be"


EQUALLY = {"a": 0.5, "b": 0.5}


def test_the_debts_of_a_source_without_further_groups_are_over() -> None:
    got = repay({"a": 0.0, "b": 0.0}, {"a": 9.0, "b": -9.0}, EQUALLY, 4, gone=("a",))
    assert got == ({"a": 0.0, "b": 0.0}, {"a": 0.0, "b": 0.0})


def test_a_debt_with_nobody_at_the_other_end_is_over() -> None:
    """A source that stood in was removed from the run."""
    assert repay({"a": 0.25}, {"a": 3.0}, {"a": 1.0}, 8) == ({"a": 0.25}, {"a": 0.0})
    got = repay({"a": 0.0, "b": 0.0}, {"a": 3.0, "b": -1.0}, EQUALLY, 4)
    assert got == ({"a": 1.0, "b": -1.0}, {"a": 0.0, "b": 0.0})


# -- whole histories --------------------------------------------------------------------------------------------------


def starved(history: History) -> LeasedBatch:
    """The next batch, with others standing in once a few turns have brought nothing."""
    for turn in range(3000):
        formed = history.mixer.form(1)
        if isinstance(formed, LeasedBatch):
            return formed
        assert isinstance(formed, Shortage)
        if turn == 3:
            history.mixer.allow_borrowing(formed.step)
        history.produce()
    raise AssertionError(f"no batch at step {history.ledger.step}: {formed}")


@pytest.mark.parametrize("seed", range(24))
def test_what_is_owed_is_carry_and_debt_and_the_debt_is_paid_back(seed: int) -> None:
    case = Case.random(seed, most=6)
    history = History(case)
    owed, got = dict.fromkeys(case.names, Fraction(0)), dict.fromkeys(case.names, 0)
    for step in range(60):
        if step == 30:  # from here on nobody stands in any more, and all have a weight
            history.set_speed(**dict.fromkeys(case.names, 1.0))
            for name in case.names:
                history.table.set(name, parse_weight(1))
        batch = starved(history) if step < 30 else history.next_batch()
        groups = batch.shares[0].groups
        assert len(groups) == case.batch_size
        states = history.ledger.sources
        for name in case.names:
            owed[name] += case.owed(step)[name] if step < 30 else Fraction(case.batch_size, len(case.names))
            got[name] += sum(group.source == name for group in groups)
            assert float(owed[name]) - got[name] == pytest.approx(states[name].carry + states[name].debt, abs=1e-6)
            assert abs(states[name].carry) < case.bound
        assert sum(state.debt for state in states.values()) == 0.0
        assert sum(max(0, state.debt) for state in states.values()) <= case.batch_size
    assert not any(state.debt for state in history.ledger.sources.values()), "all is paid back"
    replayed = history.journal.replayed({name: SourceSize(ROWS) for name in case.names})
    assert replayed.snapshot() == history.ledger.snapshot()


def test_enough_is_borrowed_in_these_histories() -> None:
    """The test above would show little if nobody ever stood in."""
    most = []
    for seed in range(12):
        history = History(Case.random(seed, most=6))
        for _ in range(20):
            starved(history)
            most.append(sum(max(0, state.debt) for state in history.ledger.sources.values()))
    assert sum(debt > 0 for debt in most) > 100
    assert max(most) == 32


HALVES = Case(
    weights={"a": Written(0.5, lambda _: 0.5), "b": Written(0.5, lambda _: 0.5)},
    speed={"a": 0.0, "b": 1.0},
    drop_rate={"a": 0.0, "b": 0.0},
    failure_rate={"a": 0.0, "b": 0.0},
    batch_size=8,
    seed=1,
)


def test_a_source_that_stopped_is_stood_in_for_one_batch_and_comes_back_slowly() -> None:
    history = History(HALVES)
    counts = [starved(history).counts for _ in range(2)]
    assert counts == [{"a": 0, "b": 8}, {"a": 0, "b": 8}]
    assert {name: state.debt for name, state in history.ledger.sources.items()} == {"a": 8, "b": -8}
    history.mixer.allow_borrowing(2)
    for _ in range(5):
        history.produce()
        shortage = history.mixer.form(1)
        assert isinstance(shortage, Shortage)
        assert "6 of 8 groups are not paid back" in shortage.standing_in, "2 of them are asked for in this batch"
    history.set_speed(a=1.0)
    counts = [history.next_batch().counts for _ in range(6)]
    assert counts == [{"a": 6, "b": 2}] * 4 + [{"a": 4, "b": 4}] * 2
    assert not any(state.debt for state in history.ledger.sources.values())


def test_a_paused_debtor_waits_with_its_debt() -> None:
    history = History(HALVES)
    starved(history)
    history.journal.record(SourcePaused("a"))
    assert history.next_batch().counts == {"a": 0, "b": 8}
    assert history.ledger.sources["a"].debt == 4
    history.set_speed(a=1.0)
    history.journal.record(SourceResumed("a"))
    assert [history.next_batch().counts["a"] for _ in range(3)] == [6, 6, 4]


def test_under_wait_nobody_stands_in() -> None:
    history = History(HALVES)
    for _ in range(50):
        history.produce()
        shortage = history.mixer.form(1)
        assert isinstance(shortage, Shortage)
        assert not shortage.standing_in
    assert history.ledger.sources["b"].outstanding == 8, "no more than its own plan was launched"


def test_debt_is_in_snapshots_and_old_ones_have_none() -> None:
    history = History(HALVES)
    starved(history)
    data = json.loads(json.dumps(history.ledger.snapshot()))
    other = Ledger({name: SourceSize(ROWS) for name in HALVES.names}, nonce="n")
    other.load(data, history.journal.frame_at)
    assert {name: state.debt for name, state in other.sources.items()} == {"a": 4, "b": -4}
    for source in data["sources"].values():
        del source["debt"]
    other.load(data, history.journal.frame_at)
    assert {name: state.debt for name, state in other.sources.items()} == {"a": 0, "b": 0}


def test_batches_without_debt_are_logged_as_before() -> None:
    history = History(replace(HALVES, speed={"a": 1.0, "b": 1.0}))
    history.next_batch()
    (batch,) = [body for kind, body in history.journal.records if kind == "event" and b'"batch"' in body]
    assert b"debt" not in batch
    assert encode_event(decode_event(batch)) == batch


# -- a real daemon ----------------------------------------------------------------------------------------------------

SOURCES = [
    {"name": "easy", "prompts": {"path": "easy.jsonl"}, "reward": "contains"},
    {"name": "hard", "prompts": {"path": "hard.jsonl"}, "reward": "contains", "sampling": {"max_new_tokens": 100_000}},
]
SLOW = [{"kind": "scripted", "tokens_per_s": 10_000.0, "first_token_s": 0.0}]


def test_others_stand_in_after_patience_and_the_debt_is_told_everywhere(tmp_path: Path) -> None:
    config = write_config(
        tmp_path,
        engines=SLOW,
        data_sources=SOURCES,
        data_source_weights=[1, 1],
        rollout={"starvation": {"policy": "borrow", "patience_s": 0.2}},
    )
    with daemon(config) as process:
        with process.connect() as client:
            batch = client.get_batch(timeout_s=30)
            assert batch.counts == {"easy": 4, "hard": 0}
            client.ack(batch.lease)
            status = client.status()
            assert {name: source["debt"] for name, source in status["sources"].items()} == {"easy": -2, "hard": 2}
            assert status["starvation"]["policy"] == "borrow"
            process.wait_for_line("step 0: ")
            process.kill()
        process.start()
        with process.connect() as client:
            assert client.status()["sources"]["hard"]["debt"] == 2, "kept over a kill"
            client.ack(client.get_batch(timeout_s=30).lease)
            assert client.status()["sources"]["hard"]["debt"] == 4.0, "one is asked back, three are borrowed"
            with pytest.raises(BatchTimeout, match=r"hard lacks 3 of 3 groups .*; .* 3 of 4 groups are not paid back"):
                client.get_batch(timeout_s=1.5)
        assert process.stop() == 0
    metrics = [line["metrics"] for line in process.log if "metrics" in line]
    assert metrics[0]["rollout/hard/debt"] == 2
    assert metrics[0]["rollout/easy/debt"] == -2


def test_under_wait_the_cause_is_logged_while_it_waits(tmp_path: Path) -> None:
    """G8: no stall without a line, also where the trainer asks again and again with short deadlines."""
    config = write_config(
        tmp_path,
        engines=SLOW,
        data_sources=SOURCES,
        data_source_weights=[1, 1],
        rollout={"starvation": {"policy": "wait", "patience_s": 0.5}},
    )
    with daemon(config) as process:
        with process.connect() as client:
            while not (lines := [line for line in process.log if line["message"].startswith("waiting ")]):
                with pytest.raises(BatchTimeout, match="hard lacks 2 of 2 groups"):
                    client.get_batch(timeout_s=0.2)
            status = client.status()
        assert "hard lacks 2 of 2 groups (" in lines[0]["message"]
        assert lines[0]["log.level"] == "warning"
        assert lines[0]["cause"]["sources"][0]["source"] == "hard"
        assert status["starvation"]["waiting_s"] > 0.5
        assert not status["starvation"]["is_borrowing"]
