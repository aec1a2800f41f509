"""Short responses are not preferred: lengths handed out against lengths launched, as measured and as they are."""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.core.ledger.ledger import Ledger, SourceSize
from orchestrator.core.ledger.length_bias import LengthBias, Lengths
from orchestrator.core.mixture.mixer import Mixer
from tests.support.builders import frame_for
from tests.support.daemon_process import daemon, write_config
from tests.support.histories import ROWS, Case, History, Written, launched

ALONE = Case({"a": Written(1.0, lambda _: 1.0)}, {"a": 0.0}, {"a": 0.0}, {"a": 0.0}, 8, 1)


class FarAhead(Mixer):
    """Plans eight batches ahead, so that much is in flight, however often a group may be overtaken."""

    horizon = 8  # type: ignore[assignment]


class LongTailed(History):
    """One source; a group takes a turn a token, and lengths are long-tailed. Knows the length of all it launched."""

    def __init__(self, *, lookahead: int, seed: int = 1) -> None:
        super().__init__(ALONE, lookahead=lookahead, kind=FarAhead)
        self.mixer.outstanding_bound = 64
        self.rng.seed(seed)
        self.length: dict[int, int] = {}
        self.left: dict[int, int] = {}

    def produce(self) -> None:
        super().produce()
        for flight in list(self.ledger.sources["a"].in_flight.values()):
            index = flight.group_index
            if index not in self.length:
                length = round(self.rng.lognormvariate(math.log(10), 1))
                self.length[index] = self.left[index] = max(1, min(300, length))
            self.left[index] -= 1
            if not self.left[index]:
                frame = frame_for(launched(flight), lengths=(self.length[index],))
                self.journal.store_group(frame)

    def report(self) -> dict:
        state = self.ledger.sources["a"]
        return state.lengths.report(state.handed_out_lengths)

    def true_bias(self) -> float:
        """Lengths of what was handed out against as many groups in the order of their launch, finished or not."""
        in_order = [self.length[index] for index in sorted(self.length)[: len(self.handed_out)]]
        return statistics.fmean(self.length[index] for index in self.handed_out) / statistics.fmean(in_order) - 1


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_bounded_overtaking_hands_out_what_was_launched(seed: int) -> None:
    """Over 60 batches of 8. Where overtaking has no bound, batches are a fifth shorter."""
    histories = {lookahead: LongTailed(lookahead=lookahead, seed=seed) for lookahead in (2, 10_000)}
    for history in histories.values():
        for _ in range(60):
            history.next_batch()
    assert abs(histories[2].true_bias()) < 0.03
    assert histories[2].report()["bias"]["overtaking"] == pytest.approx(histories[2].true_bias(), abs=0.03)
    assert histories[10_000].true_bias() < -0.15
    assert histories[10_000].report()["bias"]["overtaking"] < -0.01
    assert histories[2].report()["overtaken_groups"] > 0


def test_what_is_compared_with_is_a_fair_sample() -> None:
    """Of groups whose elders are in flight nothing is said yet: only the short ones of them have ended."""
    bias = LengthBias()
    bias.ended(3, [5, 5], kept=True, overtaken=0, oldest=1)
    bias.ended(2, [7, 7], kept=False, overtaken=0, oldest=1)
    assert bias.launched == Lengths()
    bias.ended(1, [100, 100], kept=True, overtaken=2, oldest=4)
    assert (bias.launched, bias.kept) == (Lengths(3, 6, 224), Lengths(2, 4, 210))
    assert bias.overtaken == Lengths(1, 2, 200)
    report = bias.report(Lengths(1, 2, 10))
    assert report["bias"] == {"overtaking": pytest.approx(5 / 52.5 - 1), "total": pytest.approx(5 / (224 / 6) - 1)}
    assert (report["overtaken"], report["overtaken_groups"]) == (100.0, 1)


def test_without_anything_there_is_no_bias() -> None:
    assert LengthBias().report(Lengths())["bias"] == {"overtaking": 0.0, "total": 0.0}


@given(st.permutations(range(12)), st.lists(st.integers(1, 50), min_size=12, max_size=12))
def test_in_whatever_order_groups_end_each_counts_once(order: list[int], lengths: list[int]) -> None:
    bias, flying = LengthBias(), deque(range(12))
    for cut, index in enumerate(order):
        flying.remove(index)
        bias.ended(index, [lengths[index]], kept=True, overtaken=0, oldest=min(flying, default=None))
        known = range(min(flying, default=12))
        assert bias.launched == Lengths(len(known), len(known), sum(lengths[i] for i in known))
        if cut % 4 == 0:
            data = json.loads(json.dumps(bias.snapshot()))
            bias = LengthBias()
            bias.load(data)
            assert bias.snapshot() == json.loads(json.dumps(data)) | {"ended": [tuple(e) for e in data["ended"]]}


def test_a_replay_and_a_snapshot_have_measured_the_same() -> None:
    history = LongTailed(lookahead=2)
    for _ in range(12):
        history.next_batch()
    sizes = {"a": SourceSize(ROWS)}
    loaded = Ledger(sizes, nonce="n")
    loaded.load(json.loads(json.dumps(history.ledger.snapshot())), history.journal.frame_at)
    for other in (history.journal.replayed(sizes), loaded):
        state = other.sources["a"]
        assert state.lengths.report(state.handed_out_lengths) == history.report()
        assert state.lengths.snapshot() == history.ledger.sources["a"].lengths.snapshot()


def test_snapshots_from_before_have_measured_nothing() -> None:
    bias = LengthBias()
    bias.ended(1, [3], kept=True, overtaken=1, oldest=None)
    bias.load(None)
    assert bias.snapshot() == LengthBias().snapshot()


def test_a_daemon_reports_it(tmp_path: Path) -> None:
    config = write_config(
        tmp_path,
        engines=[{"kind": "scripted", "tokens_per_s": 4000.0, "first_token_s": 0.0, "length": [1, 80]}],
        sampling={"max_new_tokens": 80},
    )
    with daemon(config) as process:
        with process.connect() as client:
            for _ in range(10):
                client.ack(client.get_batch(timeout_s=30).lease)
            source = client.status()["sources"]["easy"]
        assert process.stop() == 0
    report = source["response_len"]
    assert 0 < report["launched"] <= 80
    assert report["launched"] == report["kept"], "nothing is filtered here"
    assert -0.5 < report["bias"]["overtaking"] < 0.5
    metrics = [line["metrics"] for line in process.log if "metrics" in line]
    assert "rollout/easy/length_bias/overtaking" in metrics[-1]
    assert "rollout/easy/length_bias/total" in metrics[-1]
