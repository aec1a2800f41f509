"""What differs between two configs, in words, and what of it a running daemon can take over.

Invariants:

* What stands for one source or one engine is compared by its name, wherever it is in the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from .document import Config
from .sources import Source

__all__ = ["FIXED", "Difference", "differences", "with_fixed"]

FIXED: Final = {
    "run": "the state and the order of prompts belong to the run that was started",
    "rollout.partial_rollout": "generations in flight still use the old value",
    "rollout.chunk_tokens": "generations in flight still use the old value",
    "rollout.starvation": "a wait in progress uses the old value",
    "engine_defaults": "generations in flight still use the old value",
    "tokenizer": "the engines were checked against the old one",
    "archive": "acknowledged groups are still being written to the old one",
    "consumer": "trainers are connected to the old socket",
    "status": "the page is already served at the old address",
    "logging": "lines are already being written to the old file",
    "metrics": "the sinks have already started this run",
}
"""Keys, and sections, that a daemon reads when it starts and keeps, with the reason."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One key that has another value; ``None`` on either side also where the key is not there at all.

    ``is_live``: a running daemon takes it over; otherwise ``reason`` says why it waits for the next start.
    """

    key: str
    old: Any
    new: Any
    is_live: bool
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.key}: {self.old!r} is now {self.new!r}"


def differences(old: Config, new: Config) -> list[Difference]:
    """All keys that differ, in the order of the file; a source or an engine that comes or goes is one of them."""
    before, after = dict(_flat("", _named(old))), dict(_flat("", _named(new)))
    keys = [*before, *(key for key in after if key not in before)]
    found = []
    for key in keys:
        was, now = before.get(key), after.get(key)
        if was != now:
            reason = _reason(key)
            found.append(Difference(key, was, now, not reason, reason))
    return found


def with_fixed(old: Config, new: Config) -> Config:
    """The new config as far as a running daemon can take it over: what is fixed stays as it was."""
    keys = [key.removeprefix("rollout.") for key in FIXED if key.startswith("rollout.")]
    rollout = new.rollout.model_copy(update={key: getattr(old.rollout, key) for key in keys})
    sections = {key: getattr(old, key) for key in FIXED if "." not in key}
    return new.model_copy(update={**sections, "rollout": rollout})


def _named(config: Config) -> dict[str, Any]:
    """As JSON, lists of sources and engines by name."""
    names = config.source_names
    caps = config.data_source_reward_caps or (None,) * len(names)
    return {
        **config.model_dump(mode="json", warnings=False),  # a whole number is a weight too
        "engines": {engine.name: engine.model_dump(mode="json") for engine in config.engines},
        "data_sources": {source.name: _source(source) for source in config.data_sources},
        "data_source_weights": dict(zip(names, config.data_source_weights, strict=True)),
        "data_source_reward_caps": dict(zip(names, caps, strict=True)),
    }


def _source(source: Source) -> dict[str, Any]:
    """As JSON; of its own sampling only what it lays over the general one."""
    own = source.sampling.model_dump(mode="json", exclude_unset=True) if source.sampling is not None else None
    return source.model_dump(mode="json") | {"sampling": own}


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(f"{prefix}.{key}" if prefix else str(key), inner)
    else:
        yield prefix, value


def _reason(key: str) -> str:
    """Why a running daemon keeps what it has; empty where it takes the key over."""
    return next((why for fixed, why in FIXED.items() if key == fixed or key.startswith(f"{fixed}.")), "")
