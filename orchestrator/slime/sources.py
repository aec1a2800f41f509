"""The sources of the data source: their prompts, their cursors, and the groups that were returned.

Invariants:

* The cursor (epoch, position) points to the next prompt; within an epoch every prompt comes exactly once.
* A returned group waits in its own source's buffer, in the order in which groups were first handed out. Over all
  sources the oldest goes first.
* A call that raises has changed nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from orchestrator.errors import CorruptState, ForeignState

from .prompts import PromptRow, permutation
from .samples import leaves, source_of

__all__ = ["BufferFilter", "Group", "Source", "Sources"]

BufferFilter = Callable[[Any, None, list[Any], int], list[Any]]
"""A user's ``buffer_filter_path``. Called with ``(args, None, buffer, count)``, it removes at most ``count`` groups
from the buffer and returns them."""

Group = list[Any]
"""``n_samples_per_prompt`` samples of one prompt, or lists of samples if a generation fans out."""


def _age(group: Group) -> int:
    """The index of a group, which its samples carry: smaller is older."""
    return int(next(leaves(group)).group_index)


class Source:
    """The state of one source.

    Args:
        name: the source's name.
        rows: its prompts, at least one.
        seed: seed of the order; ``None``: the order of the file.
    """

    def __init__(self, name: str, rows: list[PromptRow], seed: int | None) -> None:
        self.name = name
        self.epoch = 0
        self.position = 0
        self.handed_out = 0
        """Groups handed out for the first time."""
        self.returned = 0
        """Groups that were returned, counted each time."""
        self.buffer: list[Group] = []
        self._rows = rows
        self._seed = seed
        self._order: tuple[int, list[int]] | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def next_prompt(self) -> PromptRow:
        """The prompt at the cursor, which advances; after the last prompt the next epoch begins."""
        row = self._rows[self._row_at_cursor()]
        self.position += 1
        if self.position == len(self._rows):
            self.epoch, self.position = self.epoch + 1, 0
        self.handed_out += 1
        return row

    def _row_at_cursor(self) -> int:
        if self._seed is None:
            return self.position
        if self._order is None or self._order[0] != self.epoch:
            order = permutation(seed=self._seed, name=self.name, epoch=self.epoch, rows=len(self._rows))
            self._order = (self.epoch, order)
        return self._order[1][self.position]

    def put_back(self, groups: Iterable[Group]) -> None:
        """Put groups into the buffer, sorted by age."""
        self.buffer.extend(groups)
        self.buffer.sort(key=_age)

    def to_json(self) -> dict[str, Any]:
        """The state without the buffer; the caller writes its samples."""
        return {
            "name": self.name,
            "rows": len(self._rows),
            "epoch": self.epoch,
            "position": self.position,
            "handed_out": self.handed_out,
            "returned": self.returned,
        }


class Sources:
    """All sources, in the order of the config."""

    def __init__(self, sources: Iterable[Source]) -> None:
        self._sources = {source.name: source for source in sources}
        self._names = tuple(self._sources)

    def __iter__(self) -> Iterator[Source]:
        return iter(self._sources.values())

    def __getitem__(self, name: str) -> Source:
        return self._sources[name]

    def of(self, group: Group) -> Source:
        """The source that a group is tagged with.

        Raises:
            SourceUnknown: its samples do not name one of these.
        """
        return self._sources[source_of(group, self._names)]

    def put_back(self, groups: Iterable[Group]) -> None:
        """Return what :meth:`take_returned` took."""
        for group in groups:
            self.of(group).put_back([group])

    def take_returned(self, count: int) -> list[Group]:
        """At most ``count`` returned groups, oldest first, from all sources."""
        taken: list[Group] = []
        while len(taken) < count:
            waiting = [source for source in self if source.buffer]
            if not waiting:
                break
            taken.append(min(waiting, key=lambda source: _age(source.buffer[0])).buffer.pop(0))
        return taken

    def take_filtered(self, count: int, buffer_filter: BufferFilter, args: Any) -> list[Group]:
        """At most ``count`` groups that the user's filter takes out of the buffers, source by source.

        Raises:
            ValueError: it returned more groups than requested.
            Exception: whatever it raised; the buffers are then unchanged.
        """
        before = [list(source.buffer) for source in self]
        taken: list[Group] = []
        try:
            for source in self:
                wanted = count - len(taken)
                if wanted and source.buffer:
                    chosen = buffer_filter(args, None, source.buffer, wanted)
                    if len(chosen) > wanted:
                        raise ValueError(f"buffer_filter_path returned {len(chosen)} groups instead of {wanted}")
                    taken += chosen
        except Exception:
            for source, buffer in zip(self, before, strict=True):
                source.buffer[:] = buffer
            raise
        return taken

    def to_json(self) -> list[dict[str, Any]]:
        """A JSON object for each source, buffers included."""
        return [source.to_json() | {"buffer": [_to_plain(group) for group in source.buffer]} for source in self]

    def restore(self, saved: Sequence[dict[str, Any]], sample_type: type[Any]) -> None:
        """Continue where :meth:`to_json` was called.

        Raises:
            ForeignState: the saved sources are others.
            CorruptState: an impossible cursor.
            KeyError, TypeError, ValueError: something is missing in the saved state.
        """
        self._refuse_foreign(saved)
        buffers = [[_from_plain(group, sample_type) for group in data["buffer"]] for data in saved]
        numbers = [[int(data[key]) for key in ("epoch", "position", "handed_out", "returned")] for data in saved]
        for source, (_, position, _, _) in zip(self, numbers, strict=True):
            if not 0 <= position < len(source):
                raise CorruptState(f"the checkpoint has {source.name} at prompt {position} of {len(source)}")
        for source, values, buffer in zip(self, numbers, buffers, strict=True):
            source.epoch, source.position, source.handed_out, source.returned = values
            source.buffer = buffer

    def _refuse_foreign(self, saved: Sequence[dict[str, Any]]) -> None:
        theirs = _listed((data["name"], data["rows"]) for data in saved)
        ours = _listed((source.name, len(source)) for source in self)
        if theirs != ours:
            raise ForeignState(
                f"the checkpoint belongs to other sources: it has {theirs}; the options have {ours}. Use the same"
                " sources, order and files, or start a new run with another --load"
            )


def _listed(sources: Iterable[tuple[str, int]]) -> str:
    return ", ".join(f"{name} ({rows} prompts)" for name, rows in sources)


def _to_plain(value: Any) -> Any:
    return [_to_plain(item) for item in value] if isinstance(value, list) else value.to_dict()


def _from_plain(value: Any, sample_type: type[Any]) -> Any:
    if isinstance(value, list):
        return [_from_plain(item, sample_type) for item in value]
    return sample_type.from_dict(value)
