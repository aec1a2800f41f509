"""The registry of engine kinds: the one place that lists them.

``docs/adding-an-engine.md`` says how to add one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Final

from orchestrator.schema.kinds import Kinds

from .embedded.spec import EmbeddedSpec
from .llamacpp.spec import LlamaCppSpec
from .openai.spec import OpenAISpec
from .scripted.spec import ScriptedSpec
from .sglang.spec import SGLangSpec
from .spec import EngineSpec

__all__ = ["ENGINE_KINDS", "AnyEngine", "named"]

ENGINE_KINDS: Final = Kinds(
    SGLangSpec,
    OpenAISpec,
    LlamaCppSpec,
    EmbeddedSpec,
    ScriptedSpec,
)

AnyEngine = Annotated[EngineSpec, ENGINE_KINDS]
"""An engine of any kind, as the type of a key of the config."""


def named(engines: Sequence[EngineSpec]) -> tuple[EngineSpec, ...]:
    """The engines, each with its name: the given one, else the default name of its kind."""
    return tuple(
        engine.model_copy(update={"name": engine.name or engine.default_name(position)})
        for position, engine in enumerate(engines)
    )
