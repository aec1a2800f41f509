"""The JSON Schema of the config, for editors: generated from the models, committed in ``config/``.

``python -m orchestrator.config.schema FILE`` writes it; a test fails when the committed one is not what the models say.

Invariants:

* What loads is accepted by the schema (keys of the other form that are null apart). The schema accepts more: what a
  config promises as a whole (``proofs.py``) and the syntax of weights are beyond it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Final

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from .document import FLAT_HOMES, ConfigFile

__all__ = ["config_schema", "render_schema"]

DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"


class _Generator(GenerateJsonSchema):
    """Without the titles that pydantic makes of key names, and with defaults that files may write."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        result = super().default_schema(schema)
        if "default_factory" in schema and "default" not in result:
            result["default"] = {}  # a section that may be left out
        return result


def config_schema() -> dict[str, Any]:
    """The schema as JSON-compatible data."""
    schema = ConfigFile.model_json_schema(schema_generator=_Generator)
    schema = {"$schema": DIALECT} | schema | {"title": "Configuration of the rollout orchestrator"}
    schema["oneOf"] = [
        {"required": ["data_sources"], "not": {"anyOf": [{"required": [key]} for key in FLAT_HOMES]}},
        {"required": ["prompt_data", "prompt_data_source_names"], "not": {"required": ["data_sources"]}},
    ]
    for definition in schema["$defs"].values():
        definition.pop("title", None)  # the name of a class of ours says nothing to a writer of YAML
    return schema


def render_schema() -> str:
    """The schema as the text of its file."""
    return json.dumps(config_schema(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(render_schema(), encoding="utf-8")
