"""A piece of a config, given on the command line."""

from __future__ import annotations

import io
from typing import Any

from orchestrator.errors import BadRequest

__all__ = ["mapping_of"]


def mapping_of(text: str, what: str, example: str) -> dict[str, Any]:
    """Parse ``text`` as a YAML mapping.

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
        raise BadRequest(f"write {what} as in the config file: '{example}'")
    return value
