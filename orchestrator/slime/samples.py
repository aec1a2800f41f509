"""Samples in slime's form: slime's own class if slime can be imported, else one with the same fields.

Invariants:

* slime, and torch with it, is imported by the first call of :func:`sample_type`, never by importing this module.
* ``to_dict`` and ``from_dict`` are inverses of each other through JSON.
* A group is a list of samples, or of lists of samples if a generation fans out; :func:`leaves` handles both.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import ModuleType
from typing import Any, ClassVar, Final

from orchestrator.errors import SourceUnknown
from orchestrator.records import SampleStatus

__all__ = [
    "SOURCE_KEY",
    "STEP_KEY",
    "WEIGHT_KEY",
    "Sample",
    "Samples",
    "leaves",
    "optional_module",
    "reward_value",
    "sample_type",
    "source_of",
]

SOURCE_KEY: Final = "data_source"
WEIGHT_KEY: Final = "data_source_weight"
STEP_KEY: Final = "data_source_rollout_step"
"""The metadata keys of each sample. Existing training code reads these names."""

Samples = Sequence[Any]
"""Samples of slime's type or of ours, possibly in lists: slime's own functions take either."""


@dataclass
class Sample:
    """One response to one prompt, with slime's field names.

    ``tokens`` are prompt and response together. ``loss_mask`` and ``rollout_log_probs``, if given, have
    ``response_length`` entries. ``reward`` is a number, a dictionary of numbers, or ``None`` until it is scored.
    """

    Status: ClassVar = SampleStatus

    group_index: int | None = None
    index: int | None = None
    rollout_id: int | None = None
    prompt: str | list[dict[str, Any]] = ""
    tokens: list[int] = field(default_factory=list)
    response: str = ""
    response_length: int = 0
    label: Any = None
    reward: float | dict[str, Any] | None = None
    loss_mask: list[int] | None = None
    rollout_log_probs: list[float] | None = None
    weight_versions: list[str] = field(default_factory=list)
    status: SampleStatus = SampleStatus.PENDING
    metadata: dict[str, Any] = field(default_factory=dict)
    train_metadata: dict[str, Any] | None = None
    session_id: str | None = None
    non_generation_time: float = 0.0
    remove_sample: bool = False

    def to_dict(self) -> dict[str, Any]:
        """A JSON object from which :meth:`from_dict` makes the sample again; foreign attributes are kept."""
        return {**vars(self), "status": self.status.value}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Sample:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: unknown status.
        """
        sample = Sample(**{name: value for name, value in data.items() if name in _FIELDS})
        sample.status = SampleStatus(data.get("status", SampleStatus.PENDING))
        for name in data.keys() - _FIELDS:
            setattr(sample, name, data[name])
        return sample


_FIELDS: Final = frozenset(item.name for item in fields(Sample))


def optional_module(name: str) -> ModuleType | None:
    """A module that may not be installed; ``None`` if it is not.

    Raises:
        ImportError: it is installed, but cannot be imported.
    """
    parent, _, _ = name.rpartition(".")
    if parent and optional_module(parent) is None:
        return None
    return importlib.import_module(name) if importlib.util.find_spec(name) is not None else None


def sample_type() -> type[Any]:
    """Slime's ``Sample`` if it can be imported, else ours."""
    module = optional_module("slime.utils.types")
    return Sample if module is None else module.Sample


def leaves(samples: Samples) -> Iterator[Any]:
    """The samples in a list of samples, of groups, or of groups that fan out, in order."""
    for item in samples:
        if isinstance(item, list | tuple):
            yield from leaves(item)
        else:
            yield item


def source_of(samples: Samples, known: Sequence[str]) -> str:
    """The source that a group was tagged with.

    Raises:
        SourceUnknown: a sample has no tag, an unknown one, or another than the rest of the group.
    """
    tags = {(sample.metadata or {}).get(SOURCE_KEY) for sample in leaves(samples)}
    if len(tags) == 1 and (tag := next(iter(tags))) in known:
        return str(tag)
    found = ", ".join(sorted(map(repr, tags))) or "nothing: the group is empty"
    raise SourceUnknown(
        f"metadata[{SOURCE_KEY!r}] must be the same in all samples of a group, and one of {', '.join(known)};"
        f" it is {found}. Keep the metadata of get_samples"
    )


def reward_value(sample: Any, reward_key: str | None) -> float | None:
    """A sample's reward as a number, from a dictionary the entry ``reward_key``; ``None`` unless it is finite."""
    reward = sample.reward
    if isinstance(reward, Mapping):
        reward = reward.get(reward_key)
    if reward is None or isinstance(reward, str):
        return None
    try:
        value = float(reward)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None
