"""A step at a glance: figures of each source, and the samples at either end of its rewards.

Invariants:

* One pass over the file, group by group; of the samples only those at the ends are kept.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import Any

from .names import ArchivedStep
from .reading import Excerpt, read_groups

__all__ = ["SourceSurvey", "StepSurvey", "survey"]


@dataclass(slots=True)
class SourceSurvey:
    """One source of a step; ``rewards`` and ``lengths`` (tokens) are of all its samples.

    ``lowest`` are the samples of lowest reward, the lowest first, ``highest`` those of highest reward; none is in both.
    """

    source: str
    weight: float | None
    groups: int = 0
    rewards: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    lowest: list[Excerpt] = field(default_factory=list)
    highest: list[Excerpt] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class StepSurvey:
    """A whole step; ``sources`` are in the order in which they come in the file."""

    file: ArchivedStep
    policy_version: int | None
    sources: list[SourceSurvey]


def survey(file: ArchivedStep, *, source: str | None = None, ends: int = 0) -> StepSurvey:
    """Look at a step. Blocks.

    Args:
        file: of the step.
        source: the one to look at; ``None``: all.
        ends: samples that are kept of either end of each source's rewards.

    Raises:
        ArchiveError: the file cannot be read.
    """
    found: dict[str, SourceSurvey] = {}
    version = None
    for group in read_groups(file, source):
        version = group["policy_version"]
        at = found.setdefault(group["source"], SourceSurvey(group["source"], group["weight"]))
        _add(at, group, ends)
    for at in found.values():
        known = {excerpt.sample["index"] for excerpt in at.lowest}
        at.highest = [excerpt for excerpt in at.highest if excerpt.sample["index"] not in known][:ends]
    return StepSurvey(file, version, list(found.values()))


def _add(at: SourceSurvey, group: dict[str, Any], ends: int) -> None:
    samples = group["samples"]
    at.groups += 1
    at.rewards += [float(sample["reward"]) for sample in samples]
    at.lengths += [int(sample["tokens"]) for sample in samples]
    if not ends:
        return
    shared = {key: value for key, value in group.items() if key != "samples"}
    excerpts = [Excerpt(shared, sample) for sample in samples]
    at.lowest = heapq.nsmallest(ends, [*at.lowest, *excerpts], key=lambda excerpt: excerpt.reward)
    at.highest = heapq.nlargest(2 * ends, [*at.highest, *excerpts], key=lambda excerpt: excerpt.reward)
