"""Weights that follow the training: what they see, what the built-in ones make of it, and that a replay agrees."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.adaptive_weights import CEILING, FLOOR, RATE, learnability, pass_rate_target, upper_confidence_bound
from orchestrator.core.filters import RewardCaps
from orchestrator.core.ledger.events import Dropped
from orchestrator.core.ledger.ledger import Ledger, SourceSize
from orchestrator.core.observations import HALF_LIFE_BATCHES, HALF_LIFE_GROUPS, NO_STATS, Observations, SourceStats
from orchestrator.core.weights.forms import parse_weight
from orchestrator.core.weights.table import WeightTable
from orchestrator.errors import FilterError, WeightError
from orchestrator.slime.options import read_weights
from tests.support.builders import MemoryJournal, frame_for, launch
from tests.support.daemon_process import daemon, write_config
from tests.support.histories import ROWS, Case, History, Written
from tests.support.slime_side import make_args

BUILT_IN = (learnability, pass_rate_target, upper_confidence_bound)
PATH = "orchestrator.adaptive_weights."

groups = st.lists(
    st.lists(st.tuples(st.sampled_from([0.0, 0.25, 1.0]), st.integers(0, 50)), min_size=1, max_size=8), max_size=30
)

# -- what they see ----------------------------------------------------------------------------------------------------


def faded(values: Sequence[float]) -> float:
    """The mean of values of which each counts half as much HALF_LIFE_GROUPS values later."""
    weights = [0.5 ** ((len(values) - 1 - i) / HALF_LIFE_GROUPS) for i in range(len(values))]
    return math.fsum(w * v for w, v in zip(weights, values, strict=True)) / math.fsum(weights)


@given(groups)
def test_statistics_are_those_of_what_was_scored(scored: list[list[tuple[float, int]]]) -> None:
    seen = Observations()
    for group in scored:
        seen.add([reward for reward, _ in group], [length for _, length in group])
    assert seen.seen == NO_STATS, "nothing changes before a batch forms"
    seen.batch_formed(0.5)
    stats, rewards = seen.seen, [[reward for reward, _ in group] for group in scored]
    assert (stats.groups, stats.count, stats.weight) == (len(scored), sum(map(len, scored)), 0.5)
    assert stats.throughput == pytest.approx(len(scored))
    if not scored:
        return
    passed = [statistics.fmean(reward >= 0.5 for reward in group) for group in rewards]
    mean = faded([statistics.fmean(group) for group in rewards])
    square = faded([statistics.fmean(reward**2 for reward in group) for group in rewards])
    assert stats.mean == pytest.approx(mean)
    assert stats.std == pytest.approx(math.sqrt(max(0.0, square - mean**2)), abs=1e-7)
    assert stats.pass_rate == pytest.approx(faded(passed))
    assert stats.signal == pytest.approx(faded([float(len(set(group)) > 1) for group in rewards]))
    assert stats.response_len == pytest.approx(faded([statistics.fmean(n for _, n in group) for group in scored]))
    estimates = [
        p * (1 - p) * (len(g) / (len(g) - 1) if len(g) > 1 else 1) for p, g in zip(passed, rewards, strict=True)
    ]
    assert stats.learnability == pytest.approx(faded(estimates))
    distances = [statistics.fmean(abs(r - statistics.fmean(group)) for r in group) for group in rewards]
    assert stats.advantage == pytest.approx(faded(distances))


def test_old_observations_fade() -> None:
    seen = Observations()
    for reward in [0.0] * HALF_LIFE_GROUPS + [1.0] * HALF_LIFE_GROUPS:
        seen.add([reward, reward], [1, 1])
    seen.batch_formed(None)
    assert seen.seen.pass_rate == pytest.approx(2 / 3)


def test_throughput_is_groups_a_batch_and_fades_by_batches() -> None:
    seen = Observations()
    for finished in [0] * HALF_LIFE_BATCHES + [6] * HALF_LIFE_BATCHES:
        for _ in range(finished):
            seen.add([1.0], [1])
        seen.batch_formed(None)
    assert seen.seen.throughput == pytest.approx(4.0)


@given(groups, st.data())
def test_a_snapshot_anywhere_goes_on_the_same(scored: list[list[tuple[float, int]]], data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(scored)))
    straight, resumed = Observations(), Observations()
    for i, group in enumerate(scored):
        if i == cut:
            snapshot = json.loads(json.dumps(resumed.snapshot()))
            resumed = Observations()
            resumed.load(snapshot)
        for observations in (straight, resumed):
            observations.add([reward for reward, _ in group], [length for _, length in group])
            if i % 3 == 0:
                observations.batch_formed(0.1 * i)
    assert resumed.snapshot() == straight.snapshot()


def test_groups_that_a_filter_dropped_count_too_and_unscored_ones_do_not() -> None:
    """Of kept groups alone, every source would have a pass rate near one half under the zero-std filter."""
    ledger = Ledger({"a": SourceSize(10), "b": SourceSize(10)}, nonce="n")
    journal = MemoryJournal(ledger)
    for outcome in ([1.0, 0.0], [0.0, 0.0], [0.0, 0.0], None):
        event = launch(journal, "a")
        assert event is not None
        if outcome == [1.0, 0.0]:
            journal.store_group(frame_for(event, rewards=outcome))
        else:
            journal.record(Dropped("a", event.group_index, "any", [3, 3], rewards=outcome or []))
    ledger.sources["a"].observed.batch_formed(None)
    ledger.sources["b"].observed.add([1.0], [1])
    ledger.sources["b"].observed.batch_formed(None)
    stats = ledger.statistics("a")
    assert (stats.groups, stats.count, stats.all_groups) == (3, 6, 4)
    assert stats.pass_rate == pytest.approx(1 / 6, abs=0.01)
    assert stats.all_recent == pytest.approx(stats.recent + 1)


# -- what the built-in ones make of it --------------------------------------------------------------------------------


def show(*groups: Sequence[float], times: int = 200, weight: float | None = None) -> SourceStats:
    seen = Observations()
    for _ in range(times):
        for rewards in groups:
            seen.add(rewards, [1] * len(rewards))
    seen.batch_formed(weight)
    return seen.seen


def test_learnability_is_four_times_p_times_one_minus_p() -> None:
    for passed in range(9):
        rewards = [1.0] * passed + [0.0] * (8 - passed)
        unbiased = passed / 8 * (1 - passed / 8) * 8 / 7
        assert learnability(0, show(rewards), floor=0.0, ceiling=9.0) == pytest.approx(4 * unbiased)


def test_learnability_is_of_prompts_and_not_of_the_source() -> None:
    """Half of the prompts always right, half never: there is nothing to learn from any of them."""
    assert show([1.0] * 8, [0.0] * 8).pass_rate == pytest.approx(0.5, abs=0.01)
    assert learnability(0, show([1.0] * 8, [0.0] * 8)) == FLOOR


@pytest.mark.parametrize(("p", "weight"), [(0.5, 1.0), (0.25, math.exp(-0.78125)), (0.0, math.exp(-3.125))])
def test_pass_rate_target(p: float, weight: float) -> None:
    rewards = [1.0] * int(8 * p) + [0.0] * int(8 - 8 * p)
    assert pass_rate_target(0, show(rewards), floor=0.0) == pytest.approx(weight)
    assert pass_rate_target(0, show(rewards), target=p) == pytest.approx(1.0)


def test_upper_confidence_bound_rises_for_a_source_that_is_not_looked_at() -> None:
    def bound(recent: float, advantage: float = 0.1) -> float:
        stats = SourceStats(groups=100, recent=recent, all_recent=180.0, advantage=advantage)
        return upper_confidence_bound(0, stats, ceiling=9.0)

    assert bound(50.0) == pytest.approx(0.2 + 0.5 * math.sqrt(2 * math.log(181) / 51))
    assert bound(10.0) > bound(50.0)
    assert bound(50.0, 0.3) > bound(50.0, 0.1)


@pytest.mark.parametrize("weight", BUILT_IN)
def test_a_source_of_which_nothing_is_known_is_looked_at(weight: Callable[..., float]) -> None:
    assert weight(0, NO_STATS) == CEILING


unit = st.floats(0.0, 1.0)


anything = st.builds(
    SourceStats,
    groups=st.integers(0, 9),
    pass_rate=unit,
    learnability=st.floats(0, 1 / 3),
    advantage=st.floats(0, 0.5),
    recent=st.floats(0, 200),
    all_recent=st.floats(0, 2000),
    weight=st.none() | st.floats(FLOOR, CEILING),
)


@given(st.sampled_from(BUILT_IN), anything)
def test_floor_ceiling_and_rate_hold(weight: Callable[..., float], stats: SourceStats) -> None:
    value = weight(3, stats)
    assert FLOOR <= value <= CEILING
    if stats.weight is not None:
        assert abs(value - stats.weight) <= RATE + 1e-12


@pytest.mark.parametrize("weight", BUILT_IN)
@pytest.mark.parametrize("limits", [{"floor": 0.5, "ceiling": 0.2}, {"floor": -0.1}, {"rate": 0.0}])
def test_limits_that_contradict_each_other(weight: Callable[..., float], limits: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="0 <= floor <= ceiling and rate > 0"):
        weight(0, NO_STATS, **limits)


# -- which functions are adaptive -------------------------------------------------------------------------------------


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "adaptive_forms.py").write_text(
        "def both(rollout_step, stats): return rollout_step + stats.groups\n"
        "def only(stats): return stats.groups\n"
        "def keyword(step, *, stats): return step + stats.groups\n"
        "def optional(step, stats=None): return 7 if stats is None else 0\n"
        "def much(step, other, stats): return 1\n"
        "def fails(step, stats): return 0.25 if not stats.groups else 1 / 0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_a_required_parameter_named_stats_makes_it_adaptive(module: Path) -> None:
    stats = SourceStats(groups=5)
    for name, at_2 in {"both": 7, "only": 5, "keyword": 7}.items():
        weight = parse_weight(f"adaptive_forms.{name}", directory=module)
        assert (weight.kind, weight(2, stats)) == ("adaptive", at_2)
    optional = parse_weight("adaptive_forms.optional", directory=module)
    assert (optional.kind, optional(2)) == ("function", 7)
    with pytest.raises(WeightError, match="cannot be called with the step and stats"):
        parse_weight("adaptive_forms.much", directory=module)


def test_where_there_are_no_statistics_adaptive_weights_are_refused(module: Path, tmp_path: Path) -> None:
    with pytest.raises(FilterError, match="functions of the step only"):
        RewardCaps(["a"], [PATH + "learnability"])
    with pytest.raises(ValueError, match="needs stats, which slime does not provide"):
        read_weights(make_args(tmp_path, {"a": 1, "b": PATH + "learnability"}))


def test_where_it_fails_the_last_one_in_force_is_kept(module: Path) -> None:
    stats = NO_STATS
    table = WeightTable(["a"], [parse_weight("adaptive_forms.fails", directory=module)], lambda _: stats)
    assert table.at(0).raw == {"a": 0.25}
    stats = SourceStats(groups=1, weight=0.25)
    row = table.at(1)
    assert row.raw == {"a": 0.25}
    assert "ZeroDivisionError at step 1" in row.warnings[0]
    assert "the last good value 0.25 is used instead" in row.warnings[0]


# -- in a run ---------------------------------------------------------------------------------------------------------


def curriculum(function: str, pass_rate: dict[str, float], seed: int = 1) -> History:
    same = dict.fromkeys(pass_rate, 0.0)
    weights = {name: Written(PATH + function, lambda _: math.nan) for name in pass_rate}
    case = Case(weights, dict.fromkeys(pass_rate, 0.5), same, same, 16, seed)
    return History(case, samples=8, pass_rate=pass_rate)


@pytest.mark.parametrize("function", [weight.__name__ for weight in BUILT_IN])
def test_the_mixture_follows_what_can_be_learned(function: str) -> None:
    history = curriculum(function, {"easy": 0.99, "middling": 0.5, "hard": 0.01})
    for _ in range(30):
        batch = history.next_batch()
    assert batch.weights["middling"] > 1.5 * max(batch.weights["easy"], batch.weights["hard"])
    assert min(batch.weights.values()) > 0.02, "the floor keeps the others observed"
    history.pass_rate = {"easy": 0.99, "middling": 0.99, "hard": 0.5}  # the model has learned
    for _ in range(60):
        batch = history.next_batch()
    assert batch.weights["hard"] > 1.5 * max(batch.weights["easy"], batch.weights["middling"])


def test_weights_change_with_batches_only_and_never_faster_than_their_rate() -> None:
    history = curriculum("learnability", {"a": 0.9, "b": 0.5})
    before = None
    for step in range(20):
        planned = history.mixer.plan()
        batch = history.next_batch()
        assert planned[0].shares == batch.weights, "what was planned when the batch before formed"
        raw = {name: state.observed.weight for name, state in history.ledger.sources.items()}
        for name, weight in raw.items():
            assert weight is not None
            if before is not None:
                assert abs(weight - before[name]) <= RATE + 1e-12, step
        before = raw


def test_a_replay_has_the_same_weights_to_the_last_bit() -> None:
    history = curriculum("upper_confidence_bound", {"a": 0.9, "b": 0.5, "c": 0.1})
    for _ in range(15):
        history.next_batch()
    history.produce()
    sizes = {name: SourceSize(ROWS) for name in history.case.names}
    snapshot = json.loads(json.dumps(history.ledger.snapshot()))
    loaded = Ledger(sizes, nonce="n")
    loaded.load(snapshot, history.journal.frame_at)
    for other in (history.journal.replayed(sizes), loaded):
        assert other.snapshot() == history.ledger.snapshot()
        table = WeightTable(history.case.names, [parse_weight(PATH + "upper_confidence_bound")] * 3, other.statistics)
        assert table.at(15) == history.table.at(15)


def test_snapshots_and_logs_from_before_have_seen_nothing() -> None:
    history = curriculum("learnability", {"a": 0.9, "b": 0.5})
    history.next_batch()
    snapshot = history.ledger.snapshot()
    for source in snapshot["sources"].values():
        del source["observed"]
    ledger = Ledger({name: SourceSize(ROWS) for name in history.case.names}, nonce="n")
    ledger.load(json.loads(json.dumps(snapshot)), history.journal.frame_at)
    assert ledger.statistics("a") == NO_STATS


def test_a_daemon_that_was_killed_goes_on_with_the_same_weights(tmp_path: Path) -> None:
    config = write_config(
        tmp_path,
        data_source_weights=[PATH + "learnability", 0.4],
        engines=[{"kind": "scripted", "time_scale": 0.0, "echo_rate": 1.0}],
    )
    with daemon(config) as process:
        with process.connect() as client:
            for _ in range(6):
                batch = client.get_batch(timeout_s=30)
                client.ack(batch.lease)
            before = client.status()
            process.kill()
        process.start()
        with process.connect() as client:
            after = client.status()
            assert after["plan"][0]["weights"] == before["plan"][0]["weights"]
            following = client.get_batch(timeout_s=30)
            assert following.weights == before["plan"][0]["weights"]
        raw = [0.4 * of.weights["easy"] / of.weights["hard"] for of in (batch, following)]
        assert abs(raw[1] - raw[0]) <= RATE + 1e-9
        assert raw[1] < CEILING, "nothing differs in these groups: the weight falls, a step at a time"
