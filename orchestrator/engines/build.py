"""From the options of a config to the engine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.engines.embedded.engine import EmbeddedEngine
from orchestrator.engines.llamacpp.engine import LlamaCppEngine
from orchestrator.engines.openai.engine import OpenAIEngine
from orchestrator.engines.sglang.engine import SGLangEngine

from .port import Engine
from .scripted import ScriptedEngine

__all__ = ["build_engine"]


def build_engine(options: Mapping[str, Any], *, workdir: Path) -> Engine:
    """The engine of ``options["kind"]``; the other options are its keyword parameters.

    Args:
        options: with ``kind`` and ``name``.
        workdir: where an engine of ours may put files.
    """
    rest = {key: value for key, value in options.items() if key != "kind"}
    match options["kind"]:
        case "sglang":
            return SGLangEngine(**rest)
        case "openai":
            return OpenAIEngine(**rest)
        case "llamacpp":
            return LlamaCppEngine(**rest)
        case "embedded":
            return EmbeddedEngine(**rest, workdir=workdir)
        case "scripted":
            return ScriptedEngine(**rest)
    raise ValueError(f"no engine of kind {options['kind']!r}")
