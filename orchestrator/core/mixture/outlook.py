"""What the mixer says of the coming batches: what each source has to produce for them, and why none can be formed now.

Invariants:

* Values: they say how things are at one moment, and change nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Demand", "Finished", "Lack", "Shortage"]


@dataclass(frozen=True, slots=True)
class Demand:
    """What one source has to produce.

    ``wanted`` groups for all planned batches, ``next_count`` of them for the next one; ``bound`` is how many may be in
    flight and buffered, by the key of the config that ``bound_by`` names.
    """

    wanted: int
    next_count: int
    bound: int
    bound_by: str


@dataclass(frozen=True, slots=True)
class Lack:
    """Why one source cannot give its part: ``needed`` groups, of which ``takeable`` are there.

    ``blocked_by`` is the group in flight that finished ones must not overtake again, if that is what they wait for.
    """

    source: str
    needed: int
    takeable: int
    in_flight: int
    blocked_by: int | None


@dataclass(frozen=True, slots=True)
class Shortage:
    """No batch can be formed now. Empty ``lacks``: no source that has prompts has a weight above 0.

    ``standing_in`` says what becomes of others that may stand in; empty where they may not.
    """

    step: int
    lacks: tuple[Lack, ...]
    standing_in: str = ""


@dataclass(frozen=True, slots=True)
class Finished:
    """No batch will be formed any more; ``leftover`` groups were too few for one."""

    step: int
    leftover: int
