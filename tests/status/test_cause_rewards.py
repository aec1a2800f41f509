"""What the cause of a late batch says of a reward, and when it says nothing."""

from __future__ import annotations

import pytest

from orchestrator.rewards import RewardStatistics
from orchestrator.status.source_cause import reward_trouble

URL = "http://judge:9000/score"

CASES = {
    "a call under way for long": (
        RewardStatistics(name="my.f", kind="process", scored=9, running=1, extra={"oldest_running_s": 12.4}),
        "a call of its reward my.f has been running for 12 s",
    ),
    "hung": (
        RewardStatistics(
            name="my.f",
            kind="process",
            timed_out=12,
            in_a_row=12,
            last_failure="timed_out",
            last_error="reward my.f: no answer within 30 s; its worker process was killed",
        ),
        "its reward my.f hung 12 times (its workers were killed); "
        "last error: no answer within 30 s; its worker process was killed",
    ),
    "some calls of many": (
        RewardStatistics(name=URL, kind="http", scored=12, timed_out=3, last_failure="timed_out", last_error="late"),
        f"its reward {URL} hung 3 times (the connections were closed); last error: late",
    ),
    "hung and failed": (
        RewardStatistics(
            name="my.f", kind="function", timed_out=1, failed=2, in_a_row=3, last_failure="failed", last_error="odd"
        ),
        "its reward my.f hung once (its calls were cancelled) and failed 2 times; last error: odd",
    ),
    "away": (
        RewardStatistics(
            name=URL,
            kind="http",
            scored=1000,
            unavailable=1,
            in_a_row=1,
            last_failure="unavailable",
            last_error=f"reward {URL}: the server answered 503: loading",
        ),
        f"its reward server {URL} is unavailable or busy, and calls wait for it: the server answered 503: loading",
    ),
    "was away": (RewardStatistics(name=URL, kind="http", scored=5, unavailable=50, last_failure="unavailable"), None),
    "failed in a row and is well again": (RewardStatistics(name="my.f", scored=100, failed=10), None),
    "one failure is no pattern": (RewardStatistics(name="my.f", failed=1, in_a_row=1, last_failure="failed"), None),
    "a call under way": (RewardStatistics(name="my.f", running=1, extra={"oldest_running_s": 2.0}), None),
    "nothing yet": (RewardStatistics(name="my.f", extra={"oldest_running_s": None}), None),
}


@pytest.mark.parametrize(("statistics", "sentence"), CASES.values(), ids=CASES.keys())
def test_what_is_said_of_a_reward(statistics: RewardStatistics, sentence: str | None) -> None:
    assert reward_trouble(statistics) == sentence
