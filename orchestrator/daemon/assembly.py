"""From the config to the components of a run, joined.

Invariants:

* Components take plain values, which ``settings`` makes of the config; none holds a reference to the whole.
* Nothing runs yet and nothing is contacted; ``daemon`` does that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from orchestrator.archive import Archiver
from orchestrator.concurrency.broadcast import Broadcast
from orchestrator.concurrency.loop_watch import LoopWatch
from orchestrator.config import Config
from orchestrator.consumer import ConsumerServer, ConsumerService, Handouts
from orchestrator.consumer.methods.batches import BatchMethods
from orchestrator.consumer.methods.checkpoints import CheckpointMethods
from orchestrator.consumer.methods.engines import EngineMethods
from orchestrator.consumer.methods.run import RunMethods
from orchestrator.consumer.methods.sources import SourceMethods
from orchestrator.consumer.methods.table import Methods
from orchestrator.consumer.starvation import Starvation
from orchestrator.consumer.waits import Waits
from orchestrator.core.filters import RewardCaps
from orchestrator.core.mixture.mixer import Mixer
from orchestrator.core.weights.table import WeightTable
from orchestrator.daemon.control.checked_changes import CheckedChanges
from orchestrator.daemon.control.checkpoints import CheckpointControl
from orchestrator.daemon.control.reload import Reloader
from orchestrator.daemon.control.run import RunControl
from orchestrator.daemon.control.running_config import RunningConfig, SharedSettings
from orchestrator.daemon.control.sources import SourceControl
from orchestrator.logs import LogHandle
from orchestrator.production.producers import Producers
from orchestrator.sinks import build_feeds
from orchestrator.state import StateStore
from orchestrator.status import StepHistory, StepMetrics

from .engine_assembly import assemble_engines
from .hold_ups import log_hold_up
from .opening import Opened
from .parts import EngineParts, OutputParts, SourceParts, TrainerParts
from .reporter import Reporter
from .settings import LiveSettings, StartSettings, live_settings, parse_weights, start_settings
from .source_pipeline import SourcePipelineFactory
from .step_log import StepLog

__all__ = ["Parts", "assemble"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """The components that the daemon supervises."""

    sources: SourceParts
    engines: EngineParts
    trainer: TrainerParts
    outputs: OutputParts
    reporter: Reporter
    reloader: Reloader
    server: ConsumerServer


@dataclass(frozen=True, slots=True, kw_only=True)
class _Base:
    """What the functions of this module build from: the settings, the state, who wakes whom, where lines go."""

    start: StartSettings
    live: LiveSettings
    store: StateStore
    changed: Broadcast
    replan: Broadcast
    logs: LogHandle
    directory: Path


def assemble(
    in_file: Config,
    opened: Opened,
    *,
    changed: Broadcast,
    replan: Broadcast,
    logs: LogHandle,
    directory: Path,
    file: Path | None = None,
) -> Parts:
    """Build the components of a run.

    Args:
        in_file: the config file's.
        opened: what the run begins with.
        changed: notified of every record; wakes waiting ``get_batch`` requests.
        replan: notified of what concerns all producers.
        logs: where lines go.
        directory: for dotted paths.
        file: that the config was read from, to read it again.

    Raises:
        OrchestratorError: something that the config names cannot be used.
    """
    base = _Base(
        start=start_settings(opened.config),
        live=live_settings(opened.config),
        store=opened.store,
        changed=changed,
        replan=replan,
        logs=logs,
        directory=directory,
    )
    outputs, waits = _outputs(base), Waits()
    engines = _engines(base, opened)
    factory = _factory(base, opened, engines, _mixer(base, waits, outputs))
    sources = _sources(base, opened, factory)
    run = _run_control(base, sources)
    trainer = _trainer(base, sources, waits)
    reporter = Reporter(
        figures=base.live.figures,
        store=base.store,
        control=run,
        sources=sources,
        engines=engines,
        trainer=trainer,
        outputs=outputs,
        logs=logs,
    )
    running = RunningConfig(
        opened.config,
        in_file=in_file,
        store=base.store,
        sources=sources,
        factory=factory,
        engines=engines.control,
        shared=SharedSettings(
            sources=sources, control=run, directory=directory, replan=replan, on_figures=reporter.reconfigure
        ),
    )
    reloader, source_control = _config_controls(base, running, run, file)
    methods: list[Methods] = [
        _batch_methods(base, run, trainer, reporter),
        EngineMethods(engines.control, base.store),
        CheckpointMethods(_checkpoint_control(base, run, sources, engines, trainer)),
        SourceMethods(source_control, reloader, base.store.ledger),
        RunMethods(run, ledger=base.store.ledger, journal=base.store, status=reporter.kept_status),
    ]
    return Parts(
        sources=sources,
        engines=engines,
        trainer=trainer,
        outputs=outputs,
        reporter=reporter,
        reloader=reloader,
        server=_server(base, engines, trainer, methods),
    )


# -- from prompts to batches -------------------------------------------------------------------------------------------


def _mixer(base: _Base, waits: Waits, outputs: OutputParts) -> tuple[Mixer, RewardCaps]:
    live, ledger = base.live, base.store.ledger
    caps = RewardCaps(list(live.caps), list(live.caps.values()), directory=base.directory)
    weights = parse_weights(live.weights.values(), directory=base.directory)
    table = WeightTable(list(live.weights), weights, ledger.statistics)
    step_log = StepLog(
        metrics=StepMetrics(ledger, caps.cap),
        table=table,
        caps=caps,
        waits=waits,
        history=outputs.history,
        feeds=outputs.feeds,
        logs=base.logs,
        log=base.logs.logger("mixer"),
    )
    mixer = Mixer(ledger=ledger, journal=base.store, table=table, settings=live.mixer, observer=step_log)
    return mixer, caps


def _engines(base: _Base, opened: Opened) -> EngineParts:
    return assemble_engines(
        opened.config,
        ledger=base.store.ledger,
        journal=base.store,
        directory=base.directory,
        probe_tokens=opened.probe_tokens,
        log=base.logs.logger("engines"),
    )


def _factory(
    base: _Base, opened: Opened, engines: EngineParts, mixture: tuple[Mixer, RewardCaps]
) -> SourcePipelineFactory:
    mixer, caps = mixture
    return SourcePipelineFactory(
        store=base.store,
        mixer=mixer,
        pool=engines.pool,
        caps=caps,
        replan=base.replan,
        logs=base.logs,
        directory=base.directory,
        tokenizer=opened.tokenizer,
    )


def _sources(base: _Base, opened: Opened, factory: SourcePipelineFactory) -> SourceParts:
    pipelines = {
        name: factory.pipeline(name, settings, opened.prompts[name], factory.reward(settings))
        for name, settings in base.live.sources.items()
    }
    producers = Producers(
        {name: pipeline.producer for name, pipeline in pipelines.items()}, base.logs.logger("producer")
    )
    return SourceParts(mixer=factory.mixer, caps=factory.caps, pipelines=pipelines, producers=producers)


# -- the trainer's side, and what goes out -----------------------------------------------------------------------------


def _trainer(base: _Base, sources: SourceParts, waits: Waits) -> TrainerParts:
    store, start, mixer = base.store, base.start, sources.mixer
    starvation = Starvation(
        mixer=mixer,
        ledger=store.ledger,
        waits=waits,
        policy=start.starvation.policy,
        patience_s=start.starvation.patience_s,
        replan=base.replan,
        changed=base.changed,
        log=base.logs.logger("mixer"),
    )
    handouts = Handouts(
        ledger=store.ledger, journal=store, mixer=mixer, changed=base.changed, archives=start.archive is not None
    )
    return TrainerParts(handouts=handouts, waits=waits, starvation=starvation, connections={})


def _batch_methods(base: _Base, run: RunControl, trainer: TrainerParts, reporter: Reporter) -> BatchMethods:
    return BatchMethods(
        ledger=base.store.ledger,
        store=base.store,
        handouts=trainer.handouts,
        waits=trainer.waits,
        changed=base.changed,
        is_draining=lambda: run.is_draining,
        cause=reporter.cause,
        routine=base.logs.routine("consumer"),
    )


def _server(base: _Base, engines: EngineParts, trainer: TrainerParts, methods: Sequence[Methods]) -> ConsumerServer:
    log, socket = base.logs.logger("consumer"), base.start.socket
    service = ConsumerService(
        run_name=base.start.run_name,
        ledger=base.store.ledger,
        handouts=trainer.handouts,
        engines=engines.control,
        methods=methods,
        connections=trainer.connections,
        log=log,
    )
    return ConsumerServer(
        socket.path, service, max_connections=socket.max_connections, allow_uids=socket.allow_uids, log=log
    )


def _outputs(base: _Base) -> OutputParts:
    start = base.start
    feeds = build_feeds(
        start.figures.sinks,
        run=start.run_name,
        state_dir=start.state_dir,
        log=base.logs.logger("metrics"),
        file=start.figures.file,
    )
    loop = LoopWatch(partial(log_hold_up, base.logs.logger("daemon")))
    return OutputParts(loop=loop, history=StepHistory(), archiver=_archiver(base), feeds=feeds)


def _archiver(base: _Base) -> Archiver | None:
    archive = base.start.archive
    if archive is None:
        return None
    return Archiver(
        directory=archive.directory,
        format_=archive.format,
        keep=archive.keep,
        state=base.store,
        changed=base.changed,
        log=base.logs.logger("archive"),
    )


# -- what may be done to the run ---------------------------------------------------------------------------------------


def _run_control(base: _Base, sources: SourceParts) -> RunControl:
    control = RunControl(
        store=base.store,
        table=sources.mixer.table,
        file_weights=base.live.weights,
        directory=base.directory,
        changed=base.changed,
        production=sources.producers,
        log=base.logs.logger("control"),
    )
    control.restore_weights()
    return control


def _checkpoint_control(
    base: _Base, run: RunControl, sources: SourceParts, engines: EngineParts, trainer: TrainerParts
) -> CheckpointControl:
    return CheckpointControl(
        store=base.store,
        handouts=trainer.handouts,
        production=sources.producers,
        pool=engines.pool,
        control=run,
        kept=base.start.keep_checkpoints,
        log=base.logs.logger("checkpoints"),
    )


def _config_controls(
    base: _Base, running: RunningConfig, run: RunControl, file: Path | None
) -> tuple[Reloader, SourceControl]:
    log, ledger = base.logs.logger("reload"), base.store.ledger
    changes = CheckedChanges(control=run, directory=base.directory, log=log)
    reloader = Reloader(file=file, running=running, changes=changes, ledger=ledger, directory=base.directory, log=log)
    return reloader, SourceControl(running=running, changes=changes, ledger=ledger, directory=base.directory, log=log)
