"""What becomes of the state when the sources of a run change.

* A source that stays keeps everything. Where it has fewer prompts than before, its groups in flight whose prompt is no
  more are dropped as ``prompt_removed``; what is finished stays.
* A source that is new begins at its first prompt; one that was there before goes on where it was.
* A source that goes: its groups in flight and in the buffer are dropped as ``source_removed``. Batches that are leased
  keep its groups. Its counts are kept, so that every group index stays accounted for.
* A source that is renamed keeps its place in its prompts, its carried remainder, and what was set at run time. Its
  groups in flight and in the buffer bear the old name: they are dropped as ``source_renamed``, their prompts run again.

The carried remainder of a source that goes is as that of one that is paused for ever (``apportionment``).

Pure: states in, states out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from orchestrator.core.observations import Observations

from .events import SourceFacts
from .source_state import SourceState

__all__ = ["PROMPT_REMOVED", "REMOVED", "RENAMED", "changed_sources"]

PROMPT_REMOVED: Final = "prompt_removed"
REMOVED: Final = "source_removed"
RENAMED: Final = "source_renamed"


def changed_sources(
    sources: Mapping[str, SourceState], retired: Mapping[str, SourceState], wanted: Iterable[SourceFacts]
) -> tuple[dict[str, SourceState], dict[str, SourceState]]:
    """The sources from now on, in the order wanted, and those that are retired.

    Args:
        sources: those in force; the states that go are changed.
        retired: those of earlier changes.
        wanted: what is to be in force.
    """
    known = {**retired, **sources}
    chosen: dict[str, SourceState] = {}
    for facts in wanted:
        state = known.get(facts.name) or SourceState(facts.name, facts.rows, facts.epochs)
        old = sources.get(facts.renamed_from) if facts.renamed_from is not None else None
        if facts.name not in sources and old is not None:
            _take_over(state, old)
        _resize(state, facts)
        chosen[facts.name] = state
    gone = {name: state for name, state in known.items() if name not in chosen}
    for state in gone.values():
        _let_go(state, REMOVED, rerun=False)
    return chosen, {name: state for name, state in gone.items() if state.launched}


def _resize(state: SourceState, facts: SourceFacts) -> None:
    for launched in [launched for launched in state.in_flight.values() if launched.prompt.prompt_index >= facts.rows]:
        state.drop(launched.group_index, PROMPT_REMOVED, [], rerun=False)
    state.resize(facts.rows, facts.epochs)


def _take_over(new: SourceState, old: SourceState) -> None:
    _let_go(old, RENAMED, rerun=True)
    new.epoch, new.position, new.carry, new.paused = old.epoch, old.position, old.carry, old.paused
    new.debt, old.debt = old.debt, 0.0
    new.observed, old.observed = old.observed, Observations()
    new.weight_override, new.weight_in_file = old.weight_override, old.weight_in_file
    new.rerun, old.rerun = old.rerun, new.rerun
    old.carry = 0.0


def _let_go(state: SourceState, reason: str, *, rerun: bool) -> None:
    for index in [*state.in_flight, *state.ready]:
        lengths = list(state.ready[index].lengths) if index in state.ready else []
        state.drop(index, reason, lengths, rerun=rerun)
