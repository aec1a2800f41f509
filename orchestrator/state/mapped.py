"""Segments of the log as one reads them back: each mapped once.

Invariants:

* A segment that is missing or damaged is so for everyone who asks for it, and is looked at once.
"""

from __future__ import annotations

from pathlib import Path

from orchestrator.core.ledger.groups import Place
from orchestrator.errors import CorruptState

from .segments import Segment

__all__ = ["Segments"]


class Segments:
    """Segments by number, mapped once."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._open: dict[int, Segment | CorruptState] = {}

    def get(self, number: int) -> Segment:
        """The segment of that number.

        Raises:
            CorruptState: it is missing or damaged.
        """
        found = self._open.get(number) or self._read(number)
        self._open[number] = found
        if isinstance(found, CorruptState):
            raise found
        return found

    def _read(self, number: int) -> Segment | CorruptState:
        try:
            return Segment(self.directory, number)
        except FileNotFoundError:
            return CorruptState(f"log segment {number} is missing")
        except CorruptState as error:
            return error

    def frame(self, place: Place) -> memoryview:
        """The body at a place; raises ``CorruptState``."""
        return self.get(place.segment).frame(place)
