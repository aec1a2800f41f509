"""Engines that come while the daemon runs: held to what a config file is held to.

Invariants:

* What is refused here would have been refused in the file, in the same words.
* An engine is kept as the JSON that a file could say, so that a restart reads it as it reads the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from orchestrator.errors import BadRequest

from .document import Config
from .engines import EngineSpec, named
from .fields import Section, list_of
from .findings import Finding
from .messages import to_findings
from .proofs import find_contradictions
from .text import key_path

__all__ = ["adapter_options", "engine_as_json", "engine_specs", "parse_engine"]


class _Engines(Section):
    engines: Annotated[tuple[EngineSpec, ...], list_of("engines", "[{kind: scripted}]", least=1)] = Field(strict=False)


def parse_engine(
    config: Config, others: Sequence[EngineSpec], raw: Mapping[str, Any], *, directory: Path
) -> EngineSpec:
    """One more engine beside ``others``, as a config file says it.

    Args:
        config: the run's.
        others: the engines of now.
        raw: ``kind`` and the keys of that kind.
        directory: what relative paths are relative to.

    Raises:
        BadRequest: with everything that is wrong.
    """
    try:
        file = _Engines.model_validate({"engines": [dict(raw)]}, context={"directory": directory})
    except ValidationError as error:
        raise BadRequest(_said(to_findings(error))) from None
    together = named((*others, *file.engines))
    findings = find_contradictions(config.model_copy(update={"engines": together}))
    if wrong := [finding for finding in findings if finding.location[0] == "engines"]:
        raise BadRequest(_said(wrong))
    return together[-1]


def engine_specs(config: Config, engines: Mapping[str, Mapping[str, Any]], *, directory: Path) -> dict[str, EngineSpec]:
    """Engines from what is kept of them: those of the file as the file has them, the others read as it is read.

    Args:
        config: the run's.
        engines: options by name.
        directory: what relative paths are relative to.

    Raises:
        BadRequest: one that is not of the file does not fit to the config any more.
    """
    in_file = {engine.name: engine for engine in config.engines}
    specs: dict[str, EngineSpec] = {}
    for name, options in engines.items():
        specs[name] = in_file.get(name) or parse_engine(config, tuple(specs.values()), options, directory=directory)
    return specs


def engine_as_json(engine: EngineSpec) -> dict[str, Any]:
    """What a config file could say of it, with its name."""
    return engine.model_dump(mode="json")


def adapter_options(engine: EngineSpec) -> dict[str, Any]:
    """The options of its adapter, with ``kind`` and ``name``."""
    return {key: getattr(engine, key) for key in type(engine).model_fields}


def _said(findings: Iterable[Finding]) -> str:
    return "; ".join(_sentence(finding) for finding in findings)


def _sentence(finding: Finding) -> str:
    place = key_path(finding.location[2:]) if len(finding.location) > 2 else "the engine"
    hint = f" ({finding.hint.removesuffix('.')})" if finding.hint else ""
    return f"{place}: {finding.message}{hint}"
