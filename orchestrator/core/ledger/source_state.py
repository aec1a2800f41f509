"""One source's durable state: its cursor, what is in flight, and its own buffer of finished groups.

Invariants:

* A group is in flight, buffered, or gone; never two of them. Group indices in flight and buffered are unique.
* The cursor is the position of the next prompt that was never launched. Prompts to run again come before it.
* Groups leave the buffer in launch order with **bounded overtaking**: a group in flight may be overtaken by younger
  ones in at most ``lookahead`` batches; then younger ones wait for it. Older groups have been overtaken at least as
  often as younger ones, so that the oldest one in flight alone decides.
* Pure: no clock, no I/O, and no knowledge of other sources.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from orchestrator.core.observations import Observations
from orchestrator.errors import CorruptState

from .groups import DropCount, InFlight, Place, PromptRef, StoredGroup
from .length_bias import LengthBias, Lengths

__all__ = ["SourceState"]


class SourceState:
    """See the module's invariants.

    Args:
        name: the source's name.
        rows: prompts in one epoch.
        epochs: how often they are gone through; ``None``: for ever.
    """

    def __init__(self, name: str, rows: int, epochs: int | None) -> None:
        self.name = name
        self.rows = rows
        self.epochs = epochs
        self.epoch = 0
        self.position = 0
        self.carry = 0.0
        self.debt = 0.0  # groups that others gave in its place; see borrowing.py
        self.paused = False
        self.weight_override: float | str | None = None
        self.weight_in_file: float | str | None = None
        self.rerun: deque[PromptRef] = deque()
        self.in_flight: dict[int, InFlight] = {}
        self.ready: dict[int, StoredGroup] = {}
        self.ready_bytes = 0
        self.ready_tokens = 0
        self._order: list[int] = []  # indices of `ready`, ascending: launch order
        self.launched = 0
        self.handed_out = 0
        self.acknowledged = 0
        self.overtakings = 0
        self.dropped: dict[str, DropCount] = {}
        self.kept_samples = 0
        self.kept_tokens = 0
        self.observed = Observations()
        self.lengths = LengthBias()

    def resize(self, rows: int, epochs: int | None) -> None:
        """Its prompts are others from now on: a position beyond their end is the beginning of the next epoch."""
        self.rows, self.epochs = rows, epochs
        if self.position >= rows:
            self.epoch, self.position = self.epoch + 1, 0
        self.rerun = deque(prompt for prompt in self.rerun if prompt.prompt_index < rows)

    # -- prompts -------------------------------------------------------------------------------------------------------

    @property
    def has_prompts(self) -> bool:
        """Whether a prompt can be launched."""
        return bool(self.rerun) or self.epochs is None or self.epoch < self.epochs

    @property
    def is_exhausted(self) -> bool:
        """Whether nothing but what is buffered will ever come."""
        return not self.has_prompts and not self.in_flight

    def next_prompt(self, row_at: Callable[[int, int], int]) -> tuple[PromptRef, bool] | None:
        """The prompt to launch next and whether it is run again; ``None`` if there is none. Changes nothing."""
        if self.rerun:
            return self.rerun[0], True
        if not self.has_prompts:
            return None
        return PromptRef(row_at(self.epoch, self.position), self.epoch), False

    def launch(self, launched: InFlight, *, rerun: bool) -> None:
        """The group is in flight and its prompt is used up.

        Raises:
            CorruptState: a rerun of a prompt that was not to be run again.
        """
        if rerun:
            if not self.rerun or self.rerun[0] != launched.prompt:
                raise CorruptState(f"source {self.name}: group {launched.group_index} uses a prompt that is not queued")
            self.rerun.popleft()
        else:
            self.position += 1
            if self.position >= self.rows:
                self.epoch, self.position = self.epoch + 1, 0
        self.in_flight[launched.group_index] = launched
        self.launched += 1

    # -- groups --------------------------------------------------------------------------------------------------------

    @property
    def outstanding(self) -> int:
        """Groups in flight and buffered: what the bounds act on."""
        return len(self.in_flight) + len(self.ready)

    def has(self, group_index: int) -> bool:
        """Whether the group is in flight or buffered."""
        return group_index in self.in_flight or group_index in self.ready

    def put(self, group: StoredGroup) -> None:
        """A group in flight is finished and buffered.

        Raises:
            CorruptState: the group is not in flight.
        """
        launched = self.in_flight.pop(group.group_index, None)
        if launched is None:
            raise CorruptState(f"source {self.name}: group {group.group_index} was finished but never launched")
        self.restore(group)
        self._ended(launched, group.rewards, group.lengths, kept=True)

    def _ended(self, launched: InFlight, rewards: Sequence[float], lengths: Sequence[int], *, kept: bool) -> None:
        """Count a group that is in flight no more; without rewards it was not scored."""
        oldest = next(iter(self.in_flight), None)
        if rewards:
            self.observed.add(rewards, lengths)
            self.lengths.ended(launched.group_index, lengths, kept=kept, overtaken=launched.overtaken, oldest=oldest)
        else:
            self.lengths.settle(oldest)

    def restore(self, group: StoredGroup) -> None:
        """Put a group back that a snapshot lists as buffered."""
        self.ready[group.group_index] = group
        insort(self._order, group.group_index)
        self.ready_bytes += len(group.frame)
        self.ready_tokens += group.tokens

    def _barrier(self, lookahead: int) -> int | None:
        """The group in flight that must not be overtaken again, if there is one."""
        oldest = next(iter(self.in_flight.values()), None)
        return oldest.group_index if oldest is not None and oldest.overtaken >= lookahead else None

    def takeable(self, lookahead: int) -> int:
        """How many buffered groups a batch may take now."""
        barrier = self._barrier(lookahead)
        if barrier is None:
            return len(self._order)
        return sum(1 for _ in self._older_than(barrier))

    def blocked_by(self, lookahead: int) -> int | None:
        """The group in flight that finished ones wait for, if that is what holds a batch up."""
        barrier = self._barrier(lookahead)
        return barrier if barrier is not None and self._order and self._order[-1] > barrier else None

    def _older_than(self, barrier: int) -> Iterator[int]:
        for index in self._order:
            if index > barrier:
                return
            yield index

    def oldest_ready(self, count: int) -> list[StoredGroup]:
        """The ``count`` buffered groups that come next, in launch order."""
        return [self.ready[index] for index in self._order[:count]]

    def recount(self) -> None:
        """Sum up the buffer anew: one of its groups has changed its size."""
        self.ready_bytes = sum(len(group.frame) for group in self.ready.values())
        self.ready_tokens = sum(group.tokens for group in self.ready.values())

    def remove(self, group_index: int) -> StoredGroup:
        """Take a group out of the buffer.

        Raises:
            CorruptState: it is not there.
        """
        group = self.ready.pop(group_index, None)
        if group is None:
            raise CorruptState(f"source {self.name}: group {group_index} is not buffered")
        del self._order[bisect_left(self._order, group_index)]
        self.ready_bytes -= len(group.frame)
        self.ready_tokens -= group.tokens
        return group

    def hand_out(self, indices: list[int]) -> list[StoredGroup]:
        """Take the groups of a batch and count whom they overtake."""
        groups = [self.remove(index) for index in indices]
        youngest = max(indices, default=-1)
        for launched in self.in_flight.values():
            if launched.group_index > youngest:
                break
            launched.overtaken += 1
            self.overtakings += 1
        self.handed_out += len(groups)
        for group in groups:
            self.kept_samples += len(group.lengths)
            self.kept_tokens += sum(group.lengths)
        return groups

    @property
    def handed_out_lengths(self) -> Lengths:
        """Of all groups handed out."""
        return Lengths(self.handed_out, self.kept_samples, self.kept_tokens)

    def drop(
        self, group_index: int, reason: str, lengths: list[int], *, rerun: bool, rewards: Sequence[float] = ()
    ) -> None:
        """End a group in flight or buffered without handing it out; ``rewards`` of one in flight that was scored.

        Raises:
            CorruptState: no such group.
        """
        launched = self.in_flight.pop(group_index, None)
        if launched is not None:
            self._ended(launched, rewards, lengths, kept=False)
        prompt = launched.prompt if launched is not None else self.remove(group_index).prompt
        self.count_dropped(prompt, reason, lengths, rerun=rerun)

    def count_dropped(self, prompt: PromptRef, reason: str, lengths: list[int], *, rerun: bool) -> None:
        """Count a group that was taken out of wherever it was; with ``rerun`` its prompt runs again."""
        self.dropped.setdefault(reason, DropCount()).add(lengths)
        if rerun:
            self.rerun.append(prompt)

    def count_discarded(self, reason: str, lengths: list[int]) -> None:
        """Count a group that was handed out and given back for good."""
        self.dropped.setdefault(reason, DropCount()).add(lengths)

    # -- snapshots -----------------------------------------------------------------------------------------------------

    def snapshot(self) -> dict[str, Any]:
        """JSON-compatible index of this state; frames are named by their places."""
        return {
            "rows": self.rows,
            "epochs": self.epochs,
            "epoch": self.epoch,
            "position": self.position,
            "carry": self.carry,
            "debt": self.debt,
            "paused": self.paused,
            "weight_override": self.weight_override,
            "weight_in_file": self.weight_in_file,
            "rerun": list(self.rerun),
            "in_flight": [
                [f.group_index, f.first_sample, f.n, f.prompt, f.overtaken, [place for place, _ in f.partials]]
                for f in self.in_flight.values()
            ],
            "ready": [self.ready[index].entry for index in self._order],
            "counters": [
                self.launched,
                self.handed_out,
                self.acknowledged,
                self.overtakings,
                self.kept_samples,
                self.kept_tokens,
            ],
            "observed": self.observed.snapshot(),
            "lengths": self.lengths.snapshot(),
            "dropped": {r: [d.groups, d.samples, d.tokens, d.longest] for r, d in self.dropped.items()},
        }

    def load(self, data: dict[str, Any], frame_at: Callable[[Place], memoryview]) -> None:
        """Become what ``snapshot`` described; ``frame_at`` gives the bytes at a place."""
        self.rows, self.epochs = data["rows"], data.get("epochs", self.epochs)
        self.epoch, self.position = data["epoch"], data["position"]
        self.carry, self.debt, self.paused = data["carry"], data.get("debt", 0.0), data["paused"]
        self.weight_override, self.weight_in_file = data["weight_override"], data["weight_in_file"]
        self.rerun = deque(PromptRef(*ref) for ref in data["rerun"])
        self.in_flight, self.ready, self._order = {}, {}, []
        self.ready_bytes = self.ready_tokens = 0
        for index, first_sample, n, prompt, overtaken, places in data["in_flight"]:
            launched = InFlight(self.name, index, first_sample, n, PromptRef(*prompt), overtaken)
            launched.load_partials(places, frame_at)
            self.in_flight[index] = launched
        for entry in data["ready"]:
            self.restore(StoredGroup.from_entry(self.name, entry, frame_at))
        self.launched, self.handed_out, self.acknowledged, self.overtakings = data["counters"][:4]
        self.kept_samples, self.kept_tokens = data["counters"][4:]
        self.observed.load(data.get("observed"))
        self.lengths.load(data.get("lengths"))
        self.dropped = {reason: DropCount(*counts) for reason, counts in data["dropped"].items()}
