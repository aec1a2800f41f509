"""The engines' side of a run, joined: those of the file, with what was changed at run time before a restart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from structlog.typing import FilteringBoundLogger

from orchestrator.config import Config, EngineSpec, engine_as_json, engine_specs
from orchestrator.core.ledger.events import ParametersHeld
from orchestrator.core.ledger.journal import Journal
from orchestrator.core.ledger.ledger import Ledger
from orchestrator.daemon.control.engines import EngineControl
from orchestrator.engines import Engine, EnginePool, KnownParameters, PoolSettings

__all__ = ["assemble_engines"]


def assemble_engines(
    config: Config,
    *,
    ledger: Ledger,
    journal: Journal,
    directory: Path,
    probe_tokens: Sequence[int] | None,
    log: FilteringBoundLogger,
) -> tuple[EnginePool, EngineControl]:
    """The pool of engines, and what may be done to it.

    Args:
        config: the whole configuration.
        ledger: the recovered facts.
        journal: where changes are recorded.
        directory: what relative paths of engines added at run time are relative to.
        probe_tokens: see :class:`~orchestrator.engines.EnginePool`.
        log: for engines that come and go.

    Raises:
        BadRequest: an engine that was added at run time does not fit to the config any more.
    """
    starting = ledger.engine_changes.starting([engine_as_json(engine) for engine in config.engines])
    for event, sentence in starting.outdated:
        log.warning(sentence)
        journal.record(event)
    specs = engine_specs(config, starting.engines, directory=directory)

    def build(spec: EngineSpec) -> Engine:
        return spec.build(workdir=config.run.state_dir)

    changes = ledger.engine_changes
    pool = EnginePool(
        [build(spec) for spec in specs.values()],
        settings=PoolSettings(
            request_timeout_s=config.engine_defaults.request_timeout_s,
            stall_s=config.engine_defaults.stall_s,
            max_retries=config.engine_defaults.max_retries,
            chunk_tokens=config.rollout.chunk_tokens,
            keep_partials=config.rollout.partial_rollout,
            seed=config.run.seed,
        ),
        policy_version=lambda: ledger.policy_version,
        log=log,
        known=KnownParameters(
            version=ledger.policy_version if ledger.version_was_set else None,
            path=changes.parameters_path,
            held=dict(changes.held),
        ),
        draining=starting.draining,
        probe_tokens=probe_tokens,
        on_held=lambda engine, version, identity: journal.record(ParametersHeld(engine, version, identity)),
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
    return pool, control
