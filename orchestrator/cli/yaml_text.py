"""A part of a config file, given on the command line."""

from __future__ import annotations

import io
from typing import Any

from orchestrator.errors import BadRequest

__all__ = ["mapping_of"]


def mapping_of(text: str, what: str, example: str) -> dict[str, Any]:
    """The YAML mapping that ``text`` is.

    Raises:
        BadRequest: it is not a mapping.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        value = YAML(typ="safe", pure=True).load(io.StringIO(text))
    except YAMLError as error:
        raise BadRequest(f"not YAML: {' '.join(str(error).split())[:300]}") from None
    if not isinstance(value, dict):
        raise BadRequest(f"{what} is written as in the config file: '{example}'")
    return value
