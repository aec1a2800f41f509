"""Why a batch is late, in one sentence with figures (G8).

Invariants:

* Every wait for a batch has a cause here; "unknown" is not among them.
* The sentence names the source, how many groups it lacks, and what would help.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from orchestrator.buffer import SourceState
from orchestrator.engines import EngineStatistics
from orchestrator.ledger import Ledger
from orchestrator.mixer import Lack, Shortage
from orchestrator.producer import ProducerStatistics
from orchestrator.rewards import RewardStatistics
from orchestrator.staleness import STALE

__all__ = ["explain", "reward_trouble"]

LOW_ACCEPTANCE: Final = 0.2
"""Below this share of groups that pass the filter, the filter is named as the cause."""

AT_WORK = ("up", "trial")
"""States of engines that take requests."""

STUCK_REWARD_S: Final = 10.0
"""A reward call that runs for longer than this is named."""

BAD_CALLS: Final = 3
BAD_SHARE: Final = 0.2
"""So many calls of a reward in a row that gave nothing, or this share of all: then it is named. One is no pattern."""

ENDED: Final = {
    "process": "its workers were killed",
    "function": "its calls were cancelled",
    "http": "the connections were closed",
}
"""What is done with calls that outlive their deadline, by the kind of reward."""


def explain(
    *,
    waiting: str | None,
    shortage: Shortage | None,
    ledger: Ledger,
    producers: Mapping[str, ProducerStatistics],
    rewards: Mapping[str, RewardStatistics],
    engines: Sequence[EngineStatistics],
    is_paused: bool,
    is_draining: bool,
    disk_fault: str | None,
) -> dict[str, Any]:
    """The cause as ``{"sentence", "kind", "sources": [{"source", "lacks", "needs", "why"}]}``.

    Args:
        waiting: a reason of the lease desk (the trainer holds its leases, a rank lags).
        shortage: what the sources lack.
        ledger: the run's facts.
        producers: by source.
        rewards: by source.
        engines: all engines.
        is_paused: generation is paused for a parameter update.
        is_draining: launching has stopped.
        disk_fault: what is wrong with the disk.
    """
    if disk_fault is not None:
        return _cause("disk", f"the state cannot be written: {disk_fault}")
    if waiting is not None:
        return _cause("trainer", waiting)
    if shortage is None:
        return _cause("none", "a batch is ready to be formed")
    if not shortage.lacks:
        return _cause("no_weight", _no_weight(ledger))
    general = _general(engines, is_paused=is_paused, is_draining=is_draining)
    sources = []
    for lack in shortage.lacks:
        why = general or _why(lack, ledger.source(lack.source), producers[lack.source], rewards[lack.source])
        lacks = lack.needed - lack.takeable
        sources.append({"source": lack.source, "lacks": lacks, "needs": lack.needed, "why": why})
    kind = "generation" if general is None else "engines"
    sentence = _sentence(shortage.step, sources, general)
    if shortage.standing_in:
        sentence += f"; {shortage.standing_in}"
    return {"sentence": sentence, "kind": kind, "sources": sources}


def _cause(kind: str, sentence: str) -> dict[str, Any]:
    return {"sentence": sentence, "kind": kind, "sources": []}


def _no_weight(ledger: Ledger) -> str:
    paused = [name for name, state in ledger.sources.items() if state.paused]
    exhausted = [name for name, state in ledger.sources.items() if state.is_exhausted]
    parts = ["no source that can give groups has a weight above 0"]
    if paused:
        parts.append(f"paused: {', '.join(paused)} (orchestrator resume SOURCE)")
    if exhausted:
        parts.append(f"exhausted: {', '.join(exhausted)}")
    return "; ".join(parts)


def _general(engines: Sequence[EngineStatistics], *, is_paused: bool, is_draining: bool) -> str | None:
    """A cause that concerns all sources alike."""
    if is_draining:
        return "the daemon is draining and launches nothing"
    if is_paused:
        return "generation is paused by pause_generation; continue_generation ends it"
    if all(engine.state not in AT_WORK for engine in engines):
        return f"no engine is at work: {'; '.join(map(_engine, engines)) or 'there is none; orchestrator engines add'}"
    return None


def _engine(engine: EngineStatistics) -> str:
    if engine.state == "outdated":
        why = "it may hold other parameters: set_policy_version or update_weights says which"
    elif engine.state == "draining":
        why = f"orchestrator engines resume {engine.name}"
    else:
        why = engine.last_error or ""
    return f"{engine.name} is {engine.state}" + (f" ({why})" if why else "")


def _why(lack: Lack, state: SourceState, producer: ProducerStatistics, reward: RewardStatistics) -> str:
    if not state.has_prompts and not state.in_flight:
        return "it has no prompt left"
    if (trouble := reward_trouble(reward)) is not None:
        return trouble
    if lack.blocked_by is not None:
        return f"group {lack.blocked_by} is still generating and was overtaken as often as allowed"
    if producer.acceptance < LOW_ACCEPTANCE:
        dropped = _most_dropped(state)
        return f"{100 * (1 - producer.acceptance):.0f} % of its finished groups are dropped{dropped}"
    stale = state.dropped[STALE].groups if STALE in state.dropped else 0
    if stale > state.handed_out:
        return f"{stale} of its groups were too old and run again: raise max_staleness, or set versions less often"
    if producer.last_failure is not None and not state.ready:
        return f"{lack.in_flight} groups are in flight; samples fail: {producer.last_failure}"
    return f"{lack.in_flight} groups are in flight"


def reward_trouble(reward: RewardStatistics) -> str | None:
    """What is wrong with a reward, by its name; ``None`` where nothing is to be seen."""
    name = reward.name
    stuck = reward.extra.get("oldest_running_s")
    if isinstance(stuck, int | float) and stuck > STUCK_REWARD_S:
        return f"a call of its reward {name} has been running for {stuck:.0f} s"
    said = (reward.last_error or "").removeprefix(f"reward {name}: ")
    if reward.in_a_row and reward.last_failure == "unavailable":
        return f"its reward server {name} is away or busy, and is waited for: {said}"
    bad = reward.failed + reward.timed_out
    share = bad / max(1, bad + reward.scored)
    if not bad or (reward.in_a_row < BAD_CALLS and (bad < BAD_CALLS or share < BAD_SHARE)):
        return None
    hung = f"hung {_times(reward.timed_out)} ({ENDED.get(reward.kind, 'the calls were ended')})"
    failed = f"failed {_times(reward.failed)}"
    what = [text for text, count in ((hung, reward.timed_out), (failed, reward.failed)) if count]
    return f"its reward {name} {' and '.join(what)}; last: {said}"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _most_dropped(state: SourceState) -> str:
    counts = [(count.groups, reason) for reason, count in state.dropped.items()]
    return f", mostly as {max(counts)[1]}" if counts else ""


def _sentence(step: int, sources: Iterable[Mapping[str, Any]], general: str | None) -> str:
    lacking = [f"{entry['source']} lacks {entry['lacks']} of {entry['needs']} groups" for entry in sources]
    if general is not None:
        return f"step {step}: {', '.join(lacking)}: {general}"
    whys = [f"{text} ({entry['why']})" for text, entry in zip(lacking, sources, strict=True)]
    return f"step {step}: {', '.join(whys)}"
