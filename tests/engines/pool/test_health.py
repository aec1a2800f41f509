"""What decides over engines, without any: the circuit breaker, late first tokens, and which parameters are held."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.engines.pool.health import DOWN_CHECK_INTERVAL_S, MAX_IN_A_ROW, MAX_REST_S, Health
from orchestrator.engines.pool.held_parameters import HeldParameters
from orchestrator.engines.pool.lateness import FIRST_SIGHT, LATE_FACTOR, LATE_FLOOR_S, FirstToken, late_after
from orchestrator.engines.port import EngineInfo

# -- the breaker ------------------------------------------------------------------------------------------------------


def up() -> Health:
    health = Health()
    assert health.probe_succeeded()
    return health


def taken_down(health: Health) -> Health:
    while not health.request_failed("broken"):
        pass
    return health


def test_an_engine_is_up_only_after_a_probe() -> None:
    health = Health()
    assert (health.state, health.takes_requests) == ("down", False)
    assert health.probe_succeeded()
    assert not health.probe_succeeded()
    assert (health.state, health.takes_requests) == ("up", True)
    assert health.probe_failed("gone")
    assert not health.probe_failed("gone")
    assert (health.state, health.takes_requests, health.last_error) == ("down", False, "gone")
    assert health.probe_succeeded()
    assert health.state == "up", "a server that was away and is back needs no trial"


@pytest.mark.parametrize("how", ["request_failed", "request_late"])
def test_requests_in_a_row_that_go_wrong_take_it_down(how: str) -> None:
    health = up()
    report = getattr(health, how)
    for _ in range(MAX_IN_A_ROW - 1):
        assert not report("bad luck")
    health.request_succeeded()
    health.first_token_in_time()
    assert [report("broken") for _ in range(MAX_IN_A_ROW + 1)] == [False] * (MAX_IN_A_ROW - 1) + [True, False]
    assert (health.state, health.last_error) == ("down", "broken")


def test_after_that_one_request_at_a_time_is_tried() -> None:
    health = taken_down(up())
    health.probe_succeeded()
    assert (health.state, health.takes_requests) == ("trial", True)
    health.request_sent()
    assert not health.takes_requests
    health.request_left()
    assert health.takes_requests, "it was cancelled, which says nothing"
    health.request_sent()
    assert health.request_failed("still broken"), "one failure is enough"
    assert health.state == "down"


@pytest.mark.parametrize("good_sign", ["first_token_in_time", "request_succeeded"])
def test_a_trial_that_goes_well_opens_it_again(good_sign: str) -> None:
    health = taken_down(up())
    health.probe_succeeded()
    health.request_sent()
    getattr(health, good_sign)()
    assert (health.state, health.takes_requests) == ("up", True)


def test_trials_become_rare_until_one_ends_well() -> None:
    health, rests = up(), []
    for _ in range(12):
        taken_down(health)
        rests.append(health.check_after_s)
        health.probe_succeeded()
    assert rests[:3] == [DOWN_CHECK_INTERVAL_S, 2 * DOWN_CHECK_INTERVAL_S, 4 * DOWN_CHECK_INTERVAL_S]
    assert rests == sorted(rests)
    assert rests[-1] == MAX_REST_S
    health.first_token_in_time()
    taken_down(health)
    assert health.check_after_s == MAX_REST_S, "a first token alone does not make up for it"
    health.probe_succeeded()
    health.request_succeeded()
    taken_down(health)
    assert health.check_after_s == DOWN_CHECK_INTERVAL_S


@given(st.lists(st.sampled_from(["up", "away", "sent", "left", "failed", "late", "first", "ended"]), max_size=60))
def test_whatever_is_reported_the_breaker_keeps_its_promises(reports: list[str]) -> None:
    health = Health()
    calls = {
        "up": health.probe_succeeded,
        "away": lambda: health.probe_failed("away"),
        "sent": health.request_sent,
        "left": health.request_left,
        "failed": lambda: health.request_failed("failed"),
        "late": lambda: health.request_late("late"),
        "first": health.first_token_in_time,
        "ended": health.request_succeeded,
    }
    for report in reports:
        before = health.state
        if report == "sent" and not health.takes_requests:
            continue
        calls[report]()
        if before == "down":
            assert health.state == "down" or report == "up"
        if report == "up":
            assert health.state != "down"
        if before == "trial" and report in ("failed", "late", "away"):
            assert health.state == "down"
        if before == "trial" and report == "sent":
            assert not health.takes_requests
        assert health.takes_requests <= health.is_up
        assert DOWN_CHECK_INTERVAL_S <= health.check_after_s <= MAX_REST_S


# -- lateness ---------------------------------------------------------------------------------------------------------


def seen(*seconds: float) -> FirstToken:
    first = FirstToken()
    for one in seconds:
        first.add(one)
    return first


def test_nothing_is_late_before_others_were_seen() -> None:
    assert late_after([]) is None
    assert late_after([seen(*[0.1] * (FIRST_SIGHT - 1))]) is None
    assert late_after([seen(*[0.1] * FIRST_SIGHT)]) == LATE_FLOOR_S


def test_the_estimate_is_that_of_rfc_6298() -> None:
    mean, deviation = 2.0, 1.0
    first = seen(2.0)
    for value in (3.0, 1.0, 2.5, 7.0, 2.0, 2.0, 2.0):
        first.add(value)
        deviation = 0.75 * deviation + 0.25 * abs(mean - value)
        mean = 0.875 * mean + 0.125 * value
    assert (first.mean_s, first.deviation_s) == (pytest.approx(mean), pytest.approx(deviation))
    assert first.longest_s == pytest.approx(mean + 4 * deviation)
    assert late_after([first]) == pytest.approx(LATE_FACTOR * (mean + 4 * deviation))


def test_the_fastest_of_the_others_counts() -> None:
    slow, fast = seen(*[30.0] * 20), seen(*[0.5] * 20)
    assert late_after([slow, fast]) == late_after([fast])
    late = late_after([slow])
    assert late is not None
    assert late > 30.0


@given(st.floats(0.001, 10.0), st.integers(0, 1 << 30))
def test_requests_like_the_others_are_not_late(middle: float, seed: int) -> None:
    draw = random.Random(seed)
    first = FirstToken()
    for _ in range(100):
        first.add(middle * draw.uniform(0.5, 1.5))
    limit = late_after([first])
    assert limit is not None
    assert limit > 1.5 * middle


# -- which parameters are held ----------------------------------------------------------------------------------------


def info(instance: str | None = "a", version: int | None = None) -> EngineInfo:
    return EngineInfo(model="m", instance=instance, policy_version=version)


def settled(version: int = 3, said: EngineInfo | None = None) -> HeldParameters:
    held = HeldParameters()
    held.told(version)
    held.probed(said or info(), required=version, was_away=False)
    assert held.is_current(version)
    return held


def test_without_a_version_every_engine_may_work() -> None:
    held = HeldParameters()
    held.probed(info(), required=None, was_away=True)
    assert held.is_current(None)
    assert not held.is_current(0)


def test_what_the_trainer_says_holds_while_the_engine_stays_the_same() -> None:
    held = settled()
    held.probed(info(), required=3, was_away=True)
    assert held.is_current(3)
    assert not held.is_current(4)


@pytest.mark.parametrize("said", [info("b"), info("a", 2), info(None)])
def test_an_engine_that_has_become_another_is_not_known_to_hold_it(said: EngineInfo) -> None:
    held = settled()
    held.probed(said, required=3, was_away=False)
    assert not held.is_current(3)
    held.probed(info(), required=3, was_away=False)
    assert not held.is_current(3), "what was lost is not found by going back"
    held.told(3)
    held.probed(said, required=3, was_away=False)
    assert held.is_current(3)


def test_an_engine_without_an_identity_is_trusted_until_it_was_away() -> None:
    held = settled(said=info(None))
    held.probed(info(None), required=3, was_away=False)
    assert held.is_current(3)
    held.probed(info(None), required=3, was_away=True)
    assert not held.is_current(3)


def test_its_own_report_is_enough() -> None:
    held = HeldParameters()
    held.probed(info("a", 2), required=3, was_away=True)
    assert not held.is_current(3)
    held.probed(info("b", 3), required=3, was_away=True)
    assert held.is_current(3)


def test_a_trainer_that_counts_otherwise_than_its_server_is_believed() -> None:
    held = settled(3, info("a", 17))
    held.probed(info("a", 17), required=3, was_away=True)
    assert held.is_current(3)
    held.probed(info("a", 18), required=3, was_away=False)
    assert not held.is_current(3)


def test_a_newer_version_than_required_is_good_enough_and_not_taken_back() -> None:
    held = HeldParameters()
    held.told(4)
    held.probed(info("a", 3), required=3, was_away=False)
    assert held.version == 4
    assert held.is_current(3)


def test_after_an_update_that_failed_half_way_nothing_is_known() -> None:
    held = settled()
    held.lost()
    held.probed(info(), required=3, was_away=False)
    assert not held.is_current(3)


def test_a_probe_that_began_before_the_newest_saying_tells_nothing() -> None:
    held = settled(3, info("a"))
    began = held.sayings
    held.told(4)
    held.probed(info("a"), required=4, was_away=False, asked_after=began)
    assert not held.is_settled
    held.probed(info("b"), required=4, was_away=False, asked_after=held.sayings)
    assert held.is_settled
    assert held.is_current(4)
