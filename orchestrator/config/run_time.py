"""Engines and sources that come while the daemon runs: held to what a config file is held to.

Invariants:

* What is refused here would have been refused in the file, in the same words.
* They are kept as the JSON that a file could say, so that a restart reads them as it reads the file.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from orchestrator.core.ledger.source_changes import SourceChanges
from orchestrator.engines.kinds import AnyEngine, named
from orchestrator.engines.spec import EngineSpec
from orchestrator.errors import BadRequest
from orchestrator.schema.fields import Section, WeightText, list_of

from .document import Config
from .messages import to_findings
from .proofs import find_contradictions
from .sources import Source
from .text import Finding, key_path

__all__ = [
    "engine_as_json",
    "engine_specs",
    "in_effect",
    "parse_engine",
    "parse_source",
    "source_as_json",
    "with_source",
    "without_sources",
]


class _Engines(Section):
    engines: Annotated[tuple[AnyEngine, ...], list_of("engines", "[{kind: scripted}]", least=1)] = Field(strict=False)


class _Sources(Section):
    data_sources: Annotated[tuple[Source, ...], list_of("sources", "[{name: …, prompts: {path: …}}]", least=1)] = Field(
        strict=False
    )
    weights: tuple[WeightText, ...] = Field(strict=False)
    caps: tuple[WeightText | None, ...] = Field(strict=False)


def parse_source(raw: Mapping[str, Any], weight: float | str, cap: float | str | None, *, directory: Path) -> Source:
    """One more source, as a config file says it.

    Args:
        raw: ``name``, ``prompts`` and the other keys of a source.
        weight: as ``data_source_weights`` says it.
        cap: as ``data_source_reward_caps`` says it.
        directory: what relative paths are relative to.

    Raises:
        BadRequest: with everything that is wrong.
    """
    values = {"data_sources": [dict(raw)], "weights": [weight], "caps": [cap]}
    try:
        file = _Sources.model_validate(values, context={"directory": directory})
    except ValidationError as error:
        raise BadRequest(_said(to_findings(error), "the source")) from None
    return file.data_sources[0]


def source_as_json(source: Source) -> dict[str, Any]:
    """What a config file could say of it."""
    return source.model_dump(mode="json", exclude_unset=True)


def with_source(config: Config, source: Source, weight: float | str, cap: float | str | None) -> Config:
    """The config with one more source.

    Raises:
        BadRequest: it contradicts the rest; everything that is wrong.
    """
    caps = config.data_source_reward_caps or (None,) * len(config.data_sources)
    more = config.model_copy(
        update={
            "data_sources": (*config.data_sources, source),
            "data_source_weights": (*config.data_source_weights, weight),
            "data_source_reward_caps": (*caps, cap),
        }
    )
    if wrong := list(find_contradictions(more)):
        raise BadRequest(_said(wrong, "the source"))
    return more


def without_sources(config: Config, names: Collection[str]) -> Config:
    """The config without these sources, their weights and caps."""
    kept = [i for i, source in enumerate(config.data_sources) if source.name not in names]
    caps = config.data_source_reward_caps
    return config.model_copy(
        update={
            "data_sources": tuple(config.data_sources[i] for i in kept),
            "data_source_weights": tuple(config.data_source_weights[i] for i in kept),
            "data_source_reward_caps": tuple(caps[i] for i in kept) if caps else None,
        }
    )


def in_effect(config: Config, changes: SourceChanges, *, directory: Path) -> tuple[Config, dict[str, str]]:
    """The file's config with what was done to its sources at run time.

    Args:
        config: the file's.
        changes: what was done.
        directory: what relative paths are relative to.

    Returns:
        The config, and sentences by the name of each source for which the file has the last word by now.

    Raises:
        BadRequest: a source that was added does not fit to the file any more, or no source is left.
    """
    outdated = changes.outdated({source.name: source_as_json(source) for source in config.data_sources})
    config = without_sources(config, changes.removed.keys() - outdated.keys())
    for name, added in changes.added.items():
        if name not in outdated:
            source = parse_source(added.source, added.weight, added.cap, directory=directory)
            config = with_source(config, source, added.weight, added.cap)
    if not config.data_sources:
        raise BadRequest("all sources of the config file were removed at run time; change one of them in the file")
    return config, outdated


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
        raise BadRequest(_said(to_findings(error), "the engine")) from None
    together = named((*others, *file.engines))
    findings = find_contradictions(config.model_copy(update={"engines": together}))
    if wrong := [finding for finding in findings if finding.location[0] == "engines"]:
        raise BadRequest(_said(wrong, "the engine"))
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


def _said(findings: Iterable[Finding], what: str) -> str:
    return "; ".join(_sentence(finding, what) for finding in findings)


def _sentence(finding: Finding, what: str) -> str:
    place = key_path(finding.location[2:]) if len(finding.location) > 2 else what
    hint = f" ({finding.hint.removesuffix('.')})" if finding.hint else ""
    return f"{place}: {finding.message}{hint}"
