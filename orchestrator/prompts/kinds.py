"""The registry of prompt kinds: the one place that lists them, and how a file that leaves ``kind`` out finds its own.

``docs/adding-a-prompt-kind.md`` says how to add one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import BeforeValidator, TypeAdapter, ValidationError, ValidationInfo
from pydantic import WithJsonSchema as Schema

from orchestrator.schema.fields import problem
from orchestrator.schema.kinds import Kinds

from .files import FileSpec
from .jsonl import JsonlSpec
from .parquet import ParquetSpec
from .reasoning.spec import ReasoningSpec
from .spec import PromptSpec

__all__ = ["PROMPT_KINDS", "AnyPath", "AnyPrompts"]


def _kind_of(raw: Mapping[Any, Any]) -> object:
    """The ``kind`` that is written, else the one that claims the path."""
    if "kind" in raw:
        return raw["kind"]
    specs = [spec for spec in PROMPT_KINDS.specs.values() if issubclass(spec, PromptSpec)]
    suffixes = [spec.suffix for spec in specs if issubclass(spec, FileSpec)]
    if "path" not in raw:
        files = f"File of prompts, {' or '.join(suffixes)}, relative to the config file"
        raise problem("is missing", f"{files}; or reasoning_gym:TASK", at=("path",))
    path = raw["path"]
    if not isinstance(path, str | Path) or not str(path).strip():
        return JsonlSpec.kind_name()  # any kind of file says what is wrong with it
    if (claimed := next((spec for spec in specs if spec.claims(str(path))), None)) is None:
        raise problem(
            f"{path}: unknown suffix {Path(path).suffix!r}; the known ones are {', '.join(suffixes)}",
            "rename the file, or set kind",
            at=("path",),
        )
    return claimed.kind_name()


PROMPT_KINDS: Final = Kinds(
    JsonlSpec,
    ParquetSpec,
    ReasoningSpec,
    choose=_kind_of,
)

AnyPrompts = Annotated[PromptSpec, PROMPT_KINDS]
"""The prompts of a source, of any kind, as the type of a key of the config."""

_ANY_PROMPTS: Final[TypeAdapter[PromptSpec]] = TypeAdapter(AnyPrompts)


def _path(value: Any, info: ValidationInfo) -> Any:
    """The path as the prompts that it stands for have it."""
    try:
        prompts = _ANY_PROMPTS.validate_python({"path": value}, context=info.context)
    except ValidationError as error:
        said = error.errors()[0]["ctx"]
        raise problem(said["message"], said["hint"]) from None
    return getattr(prompts, prompts.place)


AnyPath = Annotated[Path | str, BeforeValidator(_path, json_schema_input_type=str), Schema({"type": "string"})]
"""A path that says its kind by itself, made absolute where it is that of a file: an entry of ``prompt_data``."""
