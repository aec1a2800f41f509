"""The registry of reward kinds: the one place that lists them, and what a file may leave out.

``docs/adding-a-reward-kind.md`` says how to add one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final

from pydantic import BeforeValidator

from orchestrator.schema.kinds import Kinds

from .builtin.spec import REWARD_NAMES, BuiltInSpec
from .function import FunctionSpec
from .http.spec import HttpSpec
from .spec import RewardSpec

__all__ = ["REWARD_KINDS", "AnyReward"]


def _kind_of(raw: Mapping[Any, Any]) -> object:
    """The ``kind`` that is written, else that of the path: a function, unless it is the name of a built-in reward.

    ``kind: function`` with the name of a built-in reward is what files said before there was ``builtin``.
    """
    kind, path = raw.get("kind", FunctionSpec.kind_name()), raw.get("path")
    is_built_in = kind == FunctionSpec.kind_name() and isinstance(path, str) and path in REWARD_NAMES
    return BuiltInSpec.kind_name() if is_built_in else kind


REWARD_KINDS: Final = Kinds(
    BuiltInSpec,
    FunctionSpec,
    HttpSpec,
    choose=_kind_of,
)


def _as_mapping(value: Any) -> Any:
    """A path alone as the mapping that it stands for, and without the keys of other kinds that are null."""
    if isinstance(value, str):
        return {"path": value}
    if not isinstance(value, dict) or (spec := REWARD_KINDS.find(value)) is None:
        return value
    fields = [other.model_fields for other in REWARD_KINDS.specs.values()]
    known = {key for of_one in fields for key in of_one} - spec.model_fields.keys()
    return {key: given for key, given in value.items() if given is not None or key not in known}


AnyReward = Annotated[
    RewardSpec,
    REWARD_KINDS,
    BeforeValidator(_as_mapping, json_schema_input_type=str | Annotated[RewardSpec, REWARD_KINDS]),
]
"""A reward of any kind, as the type of a key of the config: its path alone, or a mapping with its options."""
