"""What a metric is: a name, a unit, a meaning, and how its value is read from a status.

Invariants:

* A metric describes itself completely: name, unit, meaning, labels, and how it is read. ``/metrics`` and
  ``docs/observing.md`` are both made from it.
* Reading changes nothing and never fails: an unknown value has no sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from orchestrator.status.history import FIELDS

__all__ = ["Kind", "Metric", "of_engine", "of_newest_batch", "of_run", "of_source"]

Kind = Literal["gauge", "counter"]
Facts = Mapping[str, Any]
Samples = Iterable[tuple[tuple[str, ...], float]]


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric of ``/metrics``.

    ``name``: without the ``_total`` that counters get. ``labels``: their names. ``read``: takes a status with a history
    of at least one step, gives label values and numbers.
    """

    name: str
    kind: Kind
    unit: str
    meaning: str
    labels: tuple[str, ...]
    read: Callable[[Facts], Samples]

    @property
    def exposed_name(self) -> str:
        """The name in the exposition."""
        return f"{self.name}_total" if self.kind == "counter" else self.name


def of_run(name: str, kind: Kind, unit: str, meaning: str, value: Callable[[Facts], float | None]) -> Metric:
    """A number of the whole run; ``None`` while unknown."""

    def read(status: Facts) -> Iterator[tuple[tuple[str, ...], float]]:
        number = value(status)
        if number is not None:
            yield (), float(number)

    return Metric(name, kind, unit, meaning, (), read)


def of_source(name: str, kind: Kind, unit: str, meaning: str, value: Callable[[Facts], float | None]) -> Metric:
    """A number of each source, from ``status["sources"][name]``."""

    def read(status: Facts) -> Iterator[tuple[tuple[str, ...], float]]:
        for source, facts in status["sources"].items():
            number = value(facts)
            if number is not None:
                yield (source,), float(number)

    return Metric(name, kind, unit, meaning, ("source",), read)


def of_engine(name: str, kind: Kind, unit: str, meaning: str, value: Callable[[Facts], float | None]) -> Metric:
    """A number of each engine, from ``status["engines"]``."""

    def read(status: Facts) -> Iterator[tuple[tuple[str, ...], float]]:
        for engine in status["engines"]:
            number = value(engine)
            if number is not None:
                yield (engine["name"],), float(number)

    return Metric(name, kind, unit, meaning, ("engine",), read)


def of_newest_batch(name: str, unit: str, meaning: str, *fields: str) -> Metric:
    """Figures of each source in the newest batch, as the page plots them; several fields get a label ``statistic``.

    A source without groups in the batch has its weight and counts only: it has no means.
    """
    places = [(field.rpartition("/")[2], FIELDS.index(field)) for field in fields]
    is_of_groups = "/" in fields[0]
    count = FIELDS.index("group_count")

    def read(status: Facts) -> Iterator[tuple[tuple[str, ...], float]]:
        for source, numbers in status["history"][-1]["sources"].items() if status["history"] else ():
            if is_of_groups and not numbers[count]:
                continue
            for statistic, place in places:
                if numbers[place] is not None:
                    yield (source, statistic)[: 1 + is_of_groups], float(numbers[place])

    return Metric(name, "gauge", unit, meaning, ("source", "statistic")[: 1 + is_of_groups], read)
