"""The engines' side of a run, joined: those of the file, with what was changed at run time before a restart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from structlog.typing import FilteringBoundLogger

from orchestrator.config import Config, EngineSpec, engine_specs
from orchestrator.core.ledger.journal import Journal
from orchestrator.core.ledger.ledger import Ledger
from orchestrator.daemon.control.engines import EngineControl, record_held, record_outdated
from orchestrator.engines import Engine, EnginePool, KnownParameters

from .parts import EngineParts
from .settings import engine_options, start_settings

__all__ = ["assemble_engines"]


def assemble_engines(
    config: Config,
    *,
    ledger: Ledger,
    journal: Journal,
    directory: Path,
    probe_tokens: Sequence[int] | None,
    log: FilteringBoundLogger,
) -> EngineParts:
    """The pool of engines, and what may be done to it.

    Args:
        config: the whole configuration: engines that come later are held to it too.
        ledger: the recovered facts.
        journal: where changes are recorded.
        directory: what relative paths of engines added at run time are relative to.
        probe_tokens: see :class:`~orchestrator.engines.EnginePool`.
        log: for engines that come and go.

    Raises:
        BadRequest: an engine that was added at run time does not fit to the config any more.
    """
    settings = start_settings(config)
    starting = ledger.engine_changes.starting(engine_options(config))
    record_outdated(starting, journal, log)
    specs = engine_specs(config, starting.engines, directory=directory)

    def build(spec: EngineSpec) -> Engine:
        return spec.build(workdir=settings.state_dir)

    changes = ledger.engine_changes
    pool = EnginePool(
        [build(spec) for spec in specs.values()],
        settings=settings.pool,
        policy_version=lambda: ledger.policy_version,
        log=log,
        known=KnownParameters(
            version=ledger.policy_version if ledger.version_was_set else None,
            path=changes.parameters_path,
            held=dict(changes.held),
        ),
        draining=starting.draining,
        probe_tokens=probe_tokens,
        on_held=record_held(journal),
    )
    control = EngineControl(
        config=config,
        specs=specs,
        pool=pool,
        build=build,
        ledger=ledger,
        journal=journal,
        directory=directory,
        log=log,
    )
    return EngineParts(pool=pool, control=control)
