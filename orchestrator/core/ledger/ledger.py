"""The durable facts of a run as a pure state machine: events and frames in, state out.

Invariants:

* **The state is a fold** over the records of the log: applying the same records in the same order gives the same state,
  and a snapshot followed by the records after it gives it too. Nothing else may change the ledger.
* Every launched group is in exactly one place: in flight, buffered, leased, acknowledged or dropped (G3):
  ``launched = in flight + buffered + leased + acknowledged + dropped`` for each source, discarded ones counting as
  dropped.
* ``step`` is the number of batches formed (G2); the policy version never goes back.
* Pure: no clock, no I/O, no randomness. Where the records are kept is the concern of ``state/``, which implements
  :class:`~orchestrator.core.ledger.journal.Journal`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import chain
from typing import Any, Final, NamedTuple

from orchestrator.core.observations import SourceStats
from orchestrator.errors import CorruptState, SourceUnknown, VersionWentBack
from orchestrator.frames import GroupFrame

from .changed_sources import changed_sources
from .engine_changes import EngineChanges
from .events import (
    Archived,
    BatchFormed,
    Dropped,
    EngineAdded,
    EngineDrained,
    EngineRemoved,
    Event,
    Launched,
    LeaseAcked,
    LeaseDiscarded,
    ParametersHeld,
    Resplit,
    SourcePaused,
    SourceResumed,
    SourcesChanged,
    VersionSet,
    WeightSet,
)
from .groups import InFlight, Place, PromptRef, StoredGroup
from .leases import LeasedBatch, Leases, Share
from .source_changes import SourceChanges
from .source_state import SourceState
from .unarchived import BatchKey, Unarchived

__all__ = ["DAMAGED", "Ledger", "SourceSize"]

DISCARDED = "discarded"
"""The reason under which shares count that a trainer gave back for good."""

DAMAGED = "damaged"
"""The reason under which groups count that the disk did not give back as they were written; their prompts run again."""

_NO_PLAN: Final = (LeaseAcked, Archived, VersionSet, ParametersHeld, EngineAdded, EngineDrained, EngineRemoved)
"""Events that change nothing of what the coming batches will be."""


class SourceSize(NamedTuple):
    """What the ledger has to know of a source's prompts; see :class:`~orchestrator.core.ledger.events.SourceFacts`."""

    rows: int
    epochs: int | None = None
    renamed_from: str | None = None


class Ledger:
    """See the module's invariants.

    Args:
        sources: the sources in the order of the config.
        nonce: see :class:`~orchestrator.core.ledger.leases.Leases`.
    """

    def __init__(self, sources: Mapping[str, SourceSize], *, nonce: str) -> None:
        self.sources = {name: SourceState(name, size.rows, size.epochs) for name, size in sources.items()}
        self.retired: dict[str, SourceState] = {}
        """Sources that are no more: what they launched stays accounted for."""
        self.leases = Leases(nonce)
        self.unarchived = Unarchived()
        self.engine_changes = EngineChanges()
        self.source_changes = SourceChanges()
        self.step = 0
        self.policy_version = 0
        self.version_was_set = False
        self.next_group = 0
        self.next_sample = 0
        self.plan_revision = 0
        """Rises with everything that a plan of the coming batches depends on, beside the weights."""
        self._handlers: dict[type[Any], Callable[[Any], None]] = {
            Launched: self._launched,
            Dropped: self._dropped,
            BatchFormed: self._batch_formed,
            Resplit: self._resplit,
            LeaseAcked: self._acked,
            Archived: self._archived,
            LeaseDiscarded: self._discarded,
            VersionSet: self._version_set,
            WeightSet: self._weight_set,
            SourcePaused: self._paused,
            SourceResumed: self._resumed,
            SourcesChanged: self._sources_changed,
            **dict.fromkeys((ParametersHeld, EngineAdded, EngineDrained, EngineRemoved), self.engine_changes.apply),
        }

    # -- decisions that need more than one part ------------------------------------------------------------------------

    def source(self, name: str) -> SourceState:
        """The state of one source.

        Raises:
            SourceUnknown: no source of that name; the message lists those that exist.
        """
        try:
            return self.sources[name]
        except KeyError:
            raise SourceUnknown(f"no source {name!r}; the sources are {', '.join(self.sources)}") from None

    def next_launch(self, source: str, n: int, row_at: Callable[[int, int], int]) -> Launched | None:
        """The event that would launch the source's next prompt; ``None`` if it has none. Changes nothing."""
        chosen = self.source(source).next_prompt(row_at)
        if chosen is None:
            return None
        prompt, rerun = chosen
        return Launched(
            source=source,
            group_index=self.next_group,
            first_sample=self.next_sample,
            n=n,
            prompt_index=prompt.prompt_index,
            epoch=prompt.epoch,
            rerun=rerun,
        )

    def statistics(self, source: str) -> SourceStats:
        """What an adaptive weight of this source sees."""
        all_groups, all_recent = 0, 0.0
        for state in self.sources.values():
            seen = state.observed.seen
            all_groups += seen.groups
            all_recent += seen.recent
        return replace(self.source(source).observed.seen, all_groups=all_groups, all_recent=all_recent)

    @property
    def outstanding(self) -> int:
        """Groups in flight and buffered, over all sources."""
        return sum([len(state.in_flight) + len(state.ready) for state in self.sources.values()])

    # -- the fold ------------------------------------------------------------------------------------------------------

    def apply(self, event: Event) -> None:
        """Change the state as the event says.

        Raises:
            CorruptState: the event does not match the state; the log is damaged.
            VersionWentBack: a policy version below the one in force.
        """
        try:
            self._handlers[type(event)](event)
        except (KeyError, IndexError) as error:
            raise CorruptState(f"the record {event!r} does not match the state: {error!r} is missing") from error
        if not isinstance(event, _NO_PLAN):
            self._plan_may_change(event)

    def _plan_may_change(self, event: Event) -> None:
        """A launch or a drop changes what is to come only where the source has run out of prompts, or had."""
        if isinstance(event, Launched | Dropped) and self.source(event.source).has_prompts:
            self.plan_revision += event.rerun
        else:
            self.plan_revision += 1

    def put_group(self, frame: bytes | memoryview, place: Place) -> StoredGroup:
        """A group in flight is finished: its frame enters the buffer."""
        return self.put_stored(StoredGroup.from_frame(frame, place))

    def put_stored(self, group: StoredGroup) -> StoredGroup:
        """The same, of a frame whose facts are known."""
        state = self.source(group.source)
        state.put(group)
        if not state.has_prompts:
            self.plan_revision += 1
        return group

    def put_partial(self, frame: bytes | memoryview, place: Place) -> None:
        """A group in flight gained a partial frame."""
        header = GroupFrame(frame).header
        launched = self.source(header["source"]).in_flight.get(header["group_index"])
        if launched is None:
            raise CorruptState(f"a partial rollout is for group {header['group_index']}, which is not in flight")
        if header["start"] == 0:  # the sample began anew: what was kept of it is void
            launched.partials = [p for p in launched.partials if GroupFrame(p[1]).header["slot"] != header["slot"]]
        launched.partials.append((place, frame))

    def move(self, frame: bytes | memoryview, old: Place, new: Place) -> bool:
        """A frame was copied to another place of the log; whether it was still needed."""
        header = GroupFrame(frame).header
        state, index = self._owner(header["source"]), header["group_index"]
        if "slot" in header:
            launched = state.in_flight.get(index)
            if launched is None:
                return False
            at = next((i for i, (place, _) in enumerate(launched.partials) if place == old), None)
            if at is None:
                return False
            launched.partials[at] = (new, frame)
            return True
        group = state.ready.get(index) or self.leases.group(index) or self.unarchived.group(index)
        if group is None or group.place != old:
            return False
        was_lost = group.damage is not None
        group.move(frame, new)
        if was_lost:
            state.recount()
        return True

    def _launched(self, event: Launched) -> None:
        if event.group_index != self.next_group:
            raise CorruptState(f"group {event.group_index} was launched, but {self.next_group} is next")
        launched = InFlight(
            source=event.source,
            group_index=event.group_index,
            first_sample=event.first_sample,
            n=event.n,
            prompt=PromptRef(event.prompt_index, event.epoch),
        )
        self.source(event.source).launch(launched, rerun=event.rerun)
        self.next_group = event.group_index + 1
        self.next_sample = event.first_sample + event.n

    def _dropped(self, event: Dropped) -> None:
        state = self._owner(event.source)
        if not state.has(event.group_index) and (leased := self.leases.withdraw(event.group_index)) is not None:
            state.count_dropped(leased.prompt, event.reason, event.lengths, rerun=event.rerun)
        else:
            state.drop(event.group_index, event.reason, event.lengths, rerun=event.rerun, rewards=event.rewards)

    def _batch_formed(self, event: BatchFormed) -> None:
        if event.step != self.step:
            raise CorruptState(f"a batch is for step {event.step}, but step {self.step} is next")
        taken: dict[str, list[int]] = {name: [] for name in self.sources}
        wanted = {index for share in event.shares for index in share}
        owner = {index: name for name, state in self.sources.items() for index in state.ready.keys() & wanted}
        for share in event.shares:
            for index in share:
                taken[owner[index]].append(index)
        groups = {g.group_index: g for name, indices in taken.items() for g in self.sources[name].hand_out(indices)}
        batch = LeasedBatch(event.step, event.policy_version, event.weights, event.counts, split=event.split)
        batch.shares = [Share(rank, [groups[i] for i in share]) for rank, share in enumerate(event.shares)]
        self.leases.add(batch)
        for name, carry in event.carry.items():
            self.source(name).carry = carry
        for name, debt in event.debt.items():
            self.source(name).debt = debt
        for name, state in self.sources.items():
            state.observed.batch_formed(event.adaptive.get(name))
        self.step += 1

    def _resplit(self, event: Resplit) -> None:
        self.leases.resplit(event.step, event.shares, event.split)

    def _acked(self, event: LeaseAcked) -> None:
        batch = self.leases.batches[event.step]
        groups = self.leases.finish(event.step, event.rank)
        for group in groups:
            self._owner(group.source).acknowledged += 1
        if event.archive:
            self.unarchived.add(self.leases.nonce, batch, groups)

    def _archived(self, event: Archived) -> None:
        self.unarchived.finish(BatchKey(event.history, event.step))

    def _discarded(self, event: LeaseDiscarded) -> None:
        for group in self.leases.finish(event.step, event.rank):
            self._owner(group.source).count_discarded(DISCARDED, list(group.lengths))

    def _version_set(self, event: VersionSet) -> None:
        if event.version < self.policy_version:
            raise VersionWentBack(
                f"policy version {event.version} is below {self.policy_version}, the current one; it must not decrease"
            )
        self.policy_version = event.version
        self.version_was_set = True
        self.engine_changes.apply(event)

    def _weight_set(self, event: WeightSet) -> None:
        state = self.source(event.source)
        state.weight_override, state.weight_in_file = event.weight, event.file_weight

    def _paused(self, event: SourcePaused) -> None:
        self.source(event.source).paused = True

    def _resumed(self, event: SourceResumed) -> None:
        self.source(event.source).paused = False

    def _sources_changed(self, event: SourcesChanged) -> None:
        sources, self.retired = changed_sources(self.sources, self.retired, event.sources)
        self.sources.clear()
        self.sources.update(sources)
        self.source_changes.apply(event)

    def _owner(self, source: str) -> SourceState:
        """The state that a leased group counts for, its source may be retired."""
        return self.retired.get(source) or self.source(source)

    # -- snapshots -----------------------------------------------------------------------------------------------------

    def held(self) -> tuple[list[StoredGroup], list[tuple[Place, bytes | memoryview]]]:
        """The groups that this state still needs, and the partial frames with their places.

        Lists of their own, which a worker thread may go through: for ten thousand groups that takes milliseconds.
        """
        ready = chain.from_iterable(state.ready.values() for state in self.sources.values())
        leased = chain.from_iterable(share.groups for _, share in self.leases.open_shares())
        all_launched = chain.from_iterable(state.in_flight.values() for state in self.sources.values())
        partials = [partial for launched in all_launched for partial in launched.partials]
        return [*ready, *leased, *self.unarchived.groups()], partials

    def snapshot(self) -> dict[str, Any]:
        """JSON-compatible index of the whole state."""
        return {
            "nonce": self.leases.nonce,
            "step": self.step,
            "policy_version": self.policy_version,
            "version_was_set": self.version_was_set,
            "next_group": self.next_group,
            "next_sample": self.next_sample,
            "sources": {name: state.snapshot() for name, state in self.sources.items()},
            "retired": {name: state.snapshot() for name, state in self.retired.items()},
            "leases": self.leases.snapshot(),
            "unarchived": self.unarchived.snapshot(),
            "fleet": self.engine_changes.snapshot(),
            "roster": self.source_changes.snapshot(),
        }

    def load(self, data: dict[str, Any], frame_at: Callable[[Place], memoryview]) -> None:
        """Become what ``snapshot`` described; the caller has checked that the sources are the same."""
        self.step = data["step"]
        self.policy_version = data["policy_version"]
        self.version_was_set = data["version_was_set"]
        self.next_group = data["next_group"]
        self.next_sample = data["next_sample"]
        self._load_sources(self.sources, data["sources"], frame_at)
        self._load_sources(self.retired, data.get("retired", {}), frame_at)
        self.leases.load(data["leases"], frame_at)
        self.unarchived.load(data.get("unarchived", []), frame_at)
        self.engine_changes.load(data.get("fleet", {}))
        self.source_changes.load(data.get("roster", {}))

    def _load_sources(
        self, states: dict[str, SourceState], data: dict[str, Any], frame_at: Callable[[Place], memoryview]
    ) -> None:
        """Producers hold the states: those that stay are changed in place."""
        known = dict(states)
        states.clear()
        for name, facts in data.items():
            states[name] = known.get(name) or SourceState(name, facts["rows"], None)
            states[name].load(facts, frame_at)

    def restore(self, data: dict[str, Any], frame_at: Callable[[Place], memoryview], nonce: str) -> None:
        """Go back to what ``snapshot`` described, of an earlier time: a checkpoint's.

        Its leases get new names, so that all older ones end. The engines are what they are now, and hold nobody knows
        which parameters. What was trained on is not undone: it goes on waiting for the archive. Of what waited when
        the checkpoint was made, the run that made it knows more; a new one, which has nothing, takes it over.
        """
        engine_changes, source_changes = self.engine_changes.snapshot(), self.source_changes
        self.source_changes = SourceChanges()
        unarchived, is_new, self.unarchived = self.unarchived, not self.next_group, Unarchived()
        self.load(data, frame_at)
        self.leases.nonce = nonce
        if not is_new:
            self.unarchived = unarchived
        self.engine_changes.load(engine_changes)
        self.engine_changes.forget_parameters()
        self.source_changes = source_changes
        self.version_was_set = True
        self.plan_revision += 1
