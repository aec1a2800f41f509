"""Descriptors of the log's segments, for readers that take frames from where they lie.

A stored frame is what a trainer gets, byte for byte, and a trainer is on the same machine: it may as well read the
file, whose pages are in memory, as have it sent through a socket, which copies everything twice.

Invariants:

* A descriptor reads only. What is given away is a duplicate; whoever gets it closes it.
* Segments are opened by a worker thread, and stay open for the next time: ``MAX_OPEN`` at most, those that were asked
  for last. One that is removed is closed with that, so that the disk gets its space back.
* One thread opens a segment at a time, however many wait for it, and nobody waits longer than ``OPEN_PATIENCE_S``.
"""

from __future__ import annotations

import asyncio
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence, Set
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final

import aiofiles.os

from orchestrator.core.ledger.groups import LocatedFrames, Place, StoredGroup

from .segments import segment_path

__all__ = ["MAX_OPEN", "SegmentReaders"]

MAX_OPEN: Final = 32
"""A batch is of the newest groups of each source, which lie in a few segments."""

OPEN_PATIENCE_S: Final = 1.0
"""A disk on which opening a file takes longer hangs; the frames are in memory as well."""

_open = aiofiles.os.wrap(os.open)
_FLAGS: Final = os.O_RDONLY | os.O_CLOEXEC


class SegmentReaders:
    """See the module's invariants.

    Args:
        directory: the state directory.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._open: OrderedDict[int, int] = OrderedDict()  # segment → descriptor, the last asked for at the end
        self._opening: dict[int, asyncio.Future[int]] = {}

    @property
    def numbers(self) -> set[int]:
        """Segments that are open."""
        return set(self._open)

    async def located(
        self, groups: Sequence[StoredGroup], existing: Set[int], is_readable: Callable[[Place], bool]
    ) -> LocatedFrames | None:
        """Where the frames of groups can be read; ``None`` where not all can be.

        Args:
            groups: they may be moved meanwhile.
            existing: the segments that there are; they may change meanwhile.
            is_readable: whether what should be at a place is there.
        """
        if not await self.open({group.place.segment for group in groups}):
            return None
        for number in self.numbers - existing:
            self.forget(number)
        numbers = sorted({group.place.segment for group in groups})  # anew: they may have moved
        if not (self.are_open(numbers) and all(is_readable(group.place) for group in groups)):
            return None
        table = [
            (numbers.index(segment), offset + length - len(group.frame), len(group.frame))
            for group in groups
            for segment, offset, length in (group.place,)
        ]
        try:
            return LocatedFrames(self._duplicates(numbers), table)
        except OSError:  # there are too many descriptors
            return None

    def are_open(self, numbers: Iterable[int]) -> bool:
        """Whether all of them are."""
        return all(number in self._open for number in numbers)

    async def open(self, numbers: Iterable[int]) -> bool:
        """Open those that are not; whether all are."""
        wanted = set(numbers)
        if len(wanted) > MAX_OPEN:
            return False
        for number in wanted & self._open.keys():
            self._open.move_to_end(number)  # or those to be opened would take its room
        opening = [self._begin_opening(number) for number in wanted - self._open.keys()]
        if opening:
            await asyncio.wait(opening, timeout=OPEN_PATIENCE_S)  # they go on, also where this is cancelled
        return self.are_open(wanted)

    def _begin_opening(self, number: int) -> asyncio.Future[int]:
        opening = self._opening.get(number)
        if opening is None:
            opening = asyncio.ensure_future(_open(segment_path(self._directory, number), _FLAGS))
            self._opening[number] = opening
            opening.add_done_callback(partial(self._opened, number))
        return opening

    def _opened(self, number: int, opening: asyncio.Future[int]) -> None:
        del self._opening[number]
        if opening.cancelled() or opening.exception() is not None:
            return  # removed meanwhile, or too many are open: the frames are in memory as well
        self._open[number] = opening.result()
        while len(self._open) > MAX_OPEN:
            self.forget(next(iter(self._open)))

    def _duplicates(self, numbers: Iterable[int]) -> list[int]:
        made: list[int] = []
        try:
            for number in numbers:
                self._open.move_to_end(number)
                made.append(os.dup(self._open[number]))
        except OSError:
            for descriptor in made:
                os.close(descriptor)
            raise
        return made

    def forget(self, number: int) -> None:
        """Close one, if it is open."""
        descriptor = self._open.pop(number, None)
        if descriptor is not None:
            with suppress(OSError):  # nothing was written through it
                os.close(descriptor)

    def close(self) -> None:
        """Close all."""
        for number in list(self._open):
            self.forget(number)
