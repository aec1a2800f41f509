"""What a benchmark gives: rows with goals, figures by size, and the sentence about growth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Options:
    """Of a run of the suite.

    ``is_sample``: as little as shows that it works. ``rounds`` at least five; ``peers`` by name; ``folder`` for what is
    made on the way.
    """

    folder: Path
    quick: bool = False
    is_sample: bool = False
    rounds: int = 7
    peers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Goal:
    """One row of the table: a value and the bound that it is to keep; without a bound it is only told."""

    what: str
    value: float
    unit: str = ""
    at_least: float | None = None
    at_most: float | None = None

    @property
    def is_met(self) -> bool | None:
        if self.at_least is None and self.at_most is None:
            return None
        return (self.at_least is None or self.value >= self.at_least) and (
            self.at_most is None or self.value <= self.at_most
        )

    @property
    def bound(self) -> str:
        if self.at_least is not None:
            return f"≥ {self.at_least:g}{self.unit}"
        return "" if self.at_most is None else f"≤ {self.at_most:g}{self.unit}"


@dataclass(frozen=True)
class Figure:
    """One contender at one size; microseconds a unit of work."""

    contender: str
    size: float
    wall_us: float
    cpu_us: float


@dataclass
class Result:
    """Of one benchmark. ``unit`` is what a figure is of, ``size`` what the sizes count; ``growth`` states the slope.

    ``missing``: a sentence for each thing that was asked for and not measured. ``is_of_waits``: what its picture shows
    is time by the wall.
    """

    name: str
    title: str
    unit: str
    size: str
    goals: list[Goal] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    growth: str = ""
    notes: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    is_of_waits: bool = False


Benchmark = Callable[[Options], Result]


class Unavailable(Exception):
    """This benchmark, or this peer, cannot run here; the message says why."""
