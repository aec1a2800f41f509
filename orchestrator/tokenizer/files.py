"""The files of a tokenizer, as the common libraries save them: ``tokenizer.json``, and beside it the template.

Invariants:

* Nothing is executed here: the template is text until a process of its own renders it.
* An error about a missing file names the file.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from orchestrator.errors import TokenizerError

__all__ = ["TokenizerFiles", "find_problem", "read_files"]

PACKAGES: Final = {"tokenizers": "tokenizers", "jinja2": "jinja2"}
"""Modules, and the distributions that provide them."""

INSTALL_HINT: Final = "pip install 'rollout-orchestrator[tokenizer]'"


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """The contents of a tokenizer's files.

    ``vocabulary`` is the path of ``tokenizer.json``. ``template`` is the chat template, ``None`` if there is none.
    ``special`` has the texts that templates know as ``bos_token``, ``eos_token`` and so on.
    """

    vocabulary: Path
    template: str | None
    special: dict[str, str]


def find_problem(path: Path) -> str | None:
    """Why the tokenizer at ``path`` cannot be loaded; ``None`` if no problem was found."""
    missing = [name for module, name in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        return f"needs the package {' and '.join(missing)}: {INSTALL_HINT}"
    try:
        read_files(path, template=None)
    except TokenizerError as error:
        return error.message
    return None


def read_files(path: Path, *, template: str | None) -> TokenizerFiles:
    """Read a tokenizer's directory, or its ``tokenizer.json``.

    Args:
        path: the directory or the file.
        template: replaces the one on disk.

    Raises:
        TokenizerError: a file is missing or malformed.
    """
    folder = path.parent if path.is_file() else path
    vocabulary = path if path.is_file() else path / "tokenizer.json"
    if not vocabulary.is_file():
        raise TokenizerError(
            f"{vocabulary} does not exist: give a directory that has a tokenizer.json, or the file itself"
        )
    settings = _settings(folder / "tokenizer_config.json")
    if template is None:
        template = _template(folder, settings)
    return TokenizerFiles(vocabulary, template, _special(settings))


def _settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise TokenizerError(f"cannot read {path}: {error}") from error
    if not isinstance(settings, dict):
        raise TokenizerError(f"{path} is not a JSON object")
    return settings


def _template(folder: Path, settings: dict[str, Any]) -> str | None:
    """``chat_template.jinja`` if it exists, else the entry of ``tokenizer_config.json``: a text, or several by name."""
    try:
        return (folder / "chat_template.jinja").read_text("utf-8")
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise TokenizerError(f"cannot read {folder / 'chat_template.jinja'}: {error}") from error
    template = settings.get("chat_template")
    if isinstance(template, list):
        template = next((entry.get("template") for entry in template if entry.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def _special(settings: dict[str, Any]) -> dict[str, str]:
    special = {}
    for name, value in settings.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            special[name] = text
    return special
