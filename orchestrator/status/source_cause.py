"""Why one source lacks groups, in half a sentence with figures, and in one word.

Invariants:

* The most specific cause that the facts show is named, in the order of :func:`why_lacking`. The last resort is the
  progress of the oldest group in flight.
* Each cause says what would help, where there is something to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from orchestrator.core.ledger.source_state import SourceState
from orchestrator.core.mixture.outlook import Demand, Lack
from orchestrator.core.staleness import STALE
from orchestrator.engines import EngineStatistics
from orchestrator.production.group_progress import GroupStanding
from orchestrator.production.group_source import ProducerStatistics
from orchestrator.rewards import RewardStatistics

__all__ = ["AVAILABLE", "reward_trouble", "why_lacking"]

AVAILABLE: Final = ("up", "trial")
"""States of engines that take requests."""

LOW_ACCEPTANCE: Final = 0.2
"""Below this share of groups that pass the filter, the filter is named as the cause."""

STUCK_REWARD_S: Final = 10.0
"""A reward call that runs for longer than this is named."""

BAD_CALLS: Final = 3
BAD_SHARE: Final = 0.2
"""A reward is named after this many failed calls in a row, or this share of all calls. A single one means nothing."""

LONG: Final = 2.0
"""A response counts as longer than usual when it is this many times the mean length and still generating."""

NAMED_SAMPLES: Final = 3
"""How many samples of a slow group are named, the longest ones first."""

ENDED: Final = {
    "process": "its workers were killed",
    "function": "its calls were cancelled",
    "http": "the connections were closed",
}
"""What happened to calls that passed their deadline, by the kind of reward."""


def why_lacking(
    lack: Lack,
    state: SourceState,
    demand: Demand,
    producer: ProducerStatistics,
    reward: RewardStatistics,
    *,
    engines: Sequence[EngineStatistics],
    waiting_requests: int,
    unwritten_bytes: int,
) -> tuple[str, str]:
    """The cause in one word, and in half a sentence."""
    if not state.has_prompts and not state.in_flight:
        return "exhausted", "it has no prompts left"
    if not producer.is_launching and not state.in_flight:
        return "disk", f"launching waits for the disk: {unwritten_bytes / 2**20:.1f} MiB are not written yet"
    if (trouble := reward_trouble(reward)) is not None:
        return "reward", trouble
    if lack.blocked_by is not None:
        text = f"group {lack.blocked_by} is still generating and may not be overtaken again"
        is_long = producer.oldest is not None and _is_long(producer.oldest, state)
        return "long_generation" if is_long else "overtaken", text + _progress(producer.oldest, state)
    if producer.acceptance < LOW_ACCEPTANCE:
        return "filter", f"{100 * (1 - producer.acceptance):.0f}% of its finished groups are dropped{_dropped(state)}"
    if (stale := state.dropped.get(STALE)) is not None and stale.groups > state.handed_out:
        what = f"{stale.groups} of its groups went stale and ran again, {state.handed_out} were handed out"
        return "stale", f"{what}: raise max_staleness, or set policy versions less often"
    if producer.last_failure is not None and not state.ready:
        return "samples_fail", f"{_in_flight(lack)}; samples are failing: {producer.last_failure}"
    return _generation(lack, state, demand, producer, reward, engines, waiting_requests)


def _generation(
    lack: Lack,
    state: SourceState,
    demand: Demand,
    producer: ProducerStatistics,
    reward: RewardStatistics,
    engines: Sequence[EngineStatistics],
    waiting_requests: int,
) -> tuple[str, str]:
    """Nothing is wrong; it only takes time."""
    oldest, in_flight = producer.oldest, _in_flight(lack)
    if oldest is not None and _is_long(oldest, state):
        return "long_generation", f"{in_flight}; generation takes longer than usual{_progress(oldest, state)}"
    if oldest is not None and oldest.unscored and not oldest.generating:
        what = f"group {oldest.group_index} is generated and waits for the reward {reward.name}"
        return "scoring", f"{in_flight}; {what} on {oldest.unscored} samples ({reward.running} calls running)"
    if demand.bound < demand.wanted and state.outstanding >= demand.bound:
        what = f"{demand.bound_by} allows {_groups(demand.bound)} in flight and buffered, but the plan wants"
        return "bound", f"{in_flight}; {what} {demand.wanted}: raise it{_progress(oldest, state)}"
    slots = sum(engine.max_in_flight for engine in engines if engine.state in AVAILABLE)
    if waiting_requests and sum(engine.in_flight for engine in engines) >= slots:
        what = f"all {slots} engine slots are busy and {waiting_requests} requests are waiting"
        return "slots", f"{in_flight}; {what}{_progress(oldest, state)}"
    return "generation", in_flight + _progress(oldest, state)


def _in_flight(lack: Lack) -> str:
    return f"{_groups(lack.in_flight)} {'is' if lack.in_flight == 1 else 'are'} in flight"


def _groups(count: int) -> str:
    return "1 group" if count == 1 else f"{count} groups"


def _usual(state: SourceState) -> float:
    """Mean tokens of a response, however it ended; 0 while unknown."""
    return state.lengths.launched.mean or (state.kept_tokens / state.kept_samples if state.kept_samples else 0.0)


def _is_long(oldest: GroupStanding, state: SourceState) -> bool:
    usual = _usual(state)
    return bool(usual and oldest.generating) and oldest.generating[0][1] > LONG * usual


def _progress(oldest: GroupStanding | None, state: SourceState) -> str:
    """The progress of the oldest group: its samples that are still generating, with their tokens."""
    if oldest is None:
        return ""
    text = f"; group {oldest.group_index} has been running for {oldest.running_s:.0f} s"
    if not oldest.generating:
        return text
    named = [f"sample {index} is at {tokens:,} tokens" for index, tokens in oldest.generating[:NAMED_SAMPLES]]
    more = len(oldest.generating) - len(named)
    usual = _usual(state)
    mean = f" (the mean is {usual:,.0f})" if usual else " (none has finished yet)"
    return f"{text}: {', '.join(named)}{f', and {more} more are generating' if more else ''}{mean}"


def reward_trouble(reward: RewardStatistics) -> str | None:
    """What is wrong with a reward, by its name; ``None`` if nothing seems wrong."""
    name = reward.name
    stuck = reward.extra.get("oldest_running_s")
    if isinstance(stuck, int | float) and stuck > STUCK_REWARD_S:
        return f"a call of its reward {name} has been running for {stuck:.0f} s"
    said = (reward.last_error or "").removeprefix(f"reward {name}: ")
    if reward.in_a_row and reward.last_failure == "unavailable":
        return f"its reward server {name} is unavailable or busy, and calls wait for it: {said}"
    bad = reward.failed + reward.timed_out
    share = bad / max(1, bad + reward.scored)
    if not bad or (reward.in_a_row < BAD_CALLS and (bad < BAD_CALLS or share < BAD_SHARE)):
        return None
    hung = f"hung {_times(reward.timed_out)} ({ENDED.get(reward.kind, 'the calls were ended')})"
    failed = f"failed {_times(reward.failed)}"
    what = [text for text, count in ((hung, reward.timed_out), (failed, reward.failed)) if count]
    return f"its reward {name} {' and '.join(what)}; last error: {said}"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _dropped(state: SourceState) -> str:
    """The most frequent reason, with its figures."""
    counts = [(count.groups, reason) for reason, count in state.dropped.items()]
    if not counts:
        return ""
    groups, reason = max(counts)
    return f", mostly as {reason} ({groups} of {state.launched - len(state.in_flight)})"
