"""From the config to the components of a run, joined.

Invariants:

* Only this module unpacks the config; components take plain keyword values and never hold a reference to the whole.
* Nothing runs yet and nothing is contacted; ``daemon`` does that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.archive import Archiver
from orchestrator.concurrency.broadcast import Broadcast
from orchestrator.config import Config, sink_options
from orchestrator.consumer import Connection, ConsumerServer, ConsumerService, Handouts
from orchestrator.consumer.methods.batches import BatchMethods
from orchestrator.consumer.methods.checkpoints import CheckpointMethods
from orchestrator.consumer.methods.engines import EngineMethods
from orchestrator.consumer.methods.run import RunMethods
from orchestrator.consumer.methods.sources import SourceMethods
from orchestrator.consumer.starvation import Starvation
from orchestrator.consumer.waits import Waits
from orchestrator.core.filters import RewardCaps
from orchestrator.core.mixture.mixer import Mixer
from orchestrator.core.weights.forms import parse_weight
from orchestrator.core.weights.table import WeightTable
from orchestrator.daemon.control.checkpoints import CheckpointControl
from orchestrator.daemon.control.engines import EngineControl
from orchestrator.daemon.control.reload import Reloader
from orchestrator.daemon.control.run import RunControl
from orchestrator.daemon.control.running_config import RunningConfig
from orchestrator.engines import EnginePool
from orchestrator.logs import LogHandle
from orchestrator.production.producers import Producers
from orchestrator.prompts import PromptSource
from orchestrator.sinks import SinkFeed, build_feeds
from orchestrator.state import StateStore
from orchestrator.status import StepHistory, StepMetrics
from orchestrator.tokenizer import PromptTokenizer

from .engine_assembly import assemble_engines
from .reporter import Reporter, StepLog
from .source_lines import SourceLine, SourceLines

__all__ = ["Parts", "assemble"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """The components that the daemon supervises."""

    mixer: Mixer
    pool: EnginePool
    lines: dict[str, SourceLine]
    production: Producers
    starvation: Starvation
    control: RunControl
    engines: EngineControl
    reloader: Reloader
    service: ConsumerService
    server: ConsumerServer
    reporter: Reporter
    history: StepHistory
    archiver: Archiver | None
    feeds: list[SinkFeed]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Base:
    """What every component may be given: the config, the state, who wakes whom, where lines go."""

    config: Config
    store: StateStore
    changed: Broadcast
    replan: Broadcast
    logs: LogHandle
    directory: Path

    @property
    def names(self) -> tuple[str, ...]:
        return self.config.source_names


def assemble(
    in_file: Config,
    config: Config,
    *,
    store: StateStore,
    prompts: Mapping[str, PromptSource],
    changed: Broadcast,
    replan: Broadcast,
    logs: LogHandle,
    directory: Path,
    file: Path | None = None,
    tokenizer: PromptTokenizer | None = None,
    probe_tokens: Sequence[int] | None = None,
) -> Parts:
    """Build the components of a run.

    Args:
        in_file: the config file's.
        config: the same with what was done to its sources at run time.
        store: the recovered state.
        prompts: by source.
        changed: notified of every record; wakes waiting ``get_batch`` requests.
        replan: notified of what concerns all producers.
        logs: where lines go.
        directory: for dotted paths.
        file: that the config was read from, to read it again.
        tokenizer: the run's own; ``None``: the engines tokenise.
        probe_tokens: what it makes of the text that engines are probed with.

    Raises:
        OrchestratorError: something that the config names cannot be used.
    """
    base = _Base(config=config, store=store, changed=changed, replan=replan, logs=logs, directory=directory)
    caps = RewardCaps(base.names, config.data_source_reward_caps, directory=directory)
    waits, history, feeds = Waits(), StepHistory(), _feeds(base)
    mixer = _mixer(base, caps, waits, history, feeds)
    pool, engines = assemble_engines(
        config,
        ledger=store.ledger,
        journal=store,
        directory=directory,
        probe_tokens=probe_tokens,
        log=logs.logger("engines"),
    )
    makers = SourceLines(
        store=store,
        mixer=mixer,
        pool=pool,
        caps=caps,
        replan=replan,
        logs=logs,
        directory=directory,
        tokenizer=tokenizer,
    )
    lines = {name: makers.line(config, name, prompts[name], makers.reward(config, name)) for name in base.names}
    production = Producers({name: line.producer for name, line in lines.items()})
    control = _control(base, mixer.table, production)
    control.restore_weights()
    handouts = Handouts(
        ledger=store.ledger, journal=store, mixer=mixer, changed=changed, archives=config.archive is not None
    )
    archiver = _archiver(base)
    checkpoints = CheckpointControl(
        store=store,
        handouts=handouts,
        production=production,
        pool=pool,
        control=control,
        kept=config.run.keep_checkpoints,
        log=logs.logger("checkpoints"),
    )
    starvation = Starvation(
        mixer=mixer,
        ledger=store.ledger,
        waits=waits,
        policy=config.rollout.starvation.policy,
        patience_s=config.rollout.starvation.patience_s,
        replan=replan,
        changed=changed,
        log=logs.logger("mixer"),
    )
    connections: dict[int, Connection] = {}
    reporter = Reporter(
        config=config,
        store=store,
        mixer=mixer,
        pool=pool,
        lines=lines,
        control=control,
        engines=engines,
        handouts=handouts,
        starvation=starvation,
        waits=waits,
        history=history,
        logs=logs,
        connections=connections,
        archiver=archiver,
        feeds=feeds,
    )
    running = RunningConfig(
        config,
        makers=makers,
        lines=lines,
        production=production,
        control=control,
        engines=engines,
        on_config=reporter.reconfigure,
    )
    reloader = Reloader(
        file=file,
        in_file=in_file,
        running=running,
        ledger=store.ledger,
        control=control,
        directory=directory,
        log=logs.logger("reload"),
    )
    service = ConsumerService(
        run_name=config.run.name,
        ledger=store.ledger,
        handouts=handouts,
        engines=engines,
        methods=[
            BatchMethods(
                ledger=store.ledger,
                store=store,
                handouts=handouts,
                waits=waits,
                changed=changed,
                is_draining=lambda: control.is_draining,
                cause=reporter.cause,
                routine=logs.routine("consumer"),
            ),
            EngineMethods(engines, store),
            CheckpointMethods(checkpoints),
            SourceMethods(reloader, store.ledger),
            RunMethods(control, ledger=store.ledger, journal=store, status=reporter.kept_status),
        ],
        connections=connections,
        log=logs.logger("consumer"),
    )
    server = ConsumerServer(
        config.consumer.socket,
        service,
        max_connections=config.consumer.max_connections,
        allow_uids=None if config.consumer.allow_uids is None else frozenset(config.consumer.allow_uids),
        log=logs.logger("consumer"),
    )
    return Parts(
        mixer=mixer,
        pool=pool,
        lines=lines,
        production=production,
        starvation=starvation,
        control=control,
        engines=engines,
        reloader=reloader,
        service=service,
        server=server,
        reporter=reporter,
        history=history,
        archiver=archiver,
        feeds=feeds,
    )


def _mixer(base: _Base, caps: RewardCaps, waits: Waits, history: StepHistory, feeds: list[SinkFeed]) -> Mixer:
    config, ledger = base.config, base.store.ledger
    weights = [parse_weight(weight, directory=base.directory) for weight in config.data_source_weights]
    table = WeightTable(base.names, weights, ledger.statistics)
    metrics = StepMetrics(ledger, caps.cap)
    lines = StepLog(
        metrics=metrics,
        table=table,
        caps=caps,
        waits=waits,
        history=history,
        feeds=feeds,
        logs=base.logs,
        log=base.logs.logger("mixer"),
    )
    return Mixer(
        ledger=ledger,
        journal=base.store,
        table=table,
        batch_size=config.rollout.rollout_batch_size,
        lookahead=config.rollout.lookahead,
        max_staleness=config.rollout.max_staleness,
        num_rollout=config.rollout.num_rollout,
        outstanding_bound=config.outstanding_bound,
        buffer_bounds={source.name: (source.buffer.groups, source.buffer.bytes) for source in config.data_sources},
        on_formed=lines.batch_formed,
    )


def _feeds(base: _Base) -> list[SinkFeed]:
    metrics = base.config.metrics
    return build_feeds(
        [sink_options(sink) for sink in metrics.sinks],
        run=base.config.run.name,
        state_dir=base.config.run.state_dir,
        log=base.logs.logger("metrics"),
        file=(metrics.max_bytes, metrics.keep) if metrics.jsonl else None,
    )


def _archiver(base: _Base) -> Archiver | None:
    archive, store = base.config.archive, base.store
    if archive is None:
        return None
    return Archiver(
        directory=archive.path,
        format_=archive.format,
        keep=archive.keep,
        state=store,
        changed=base.changed,
        log=base.logs.logger("archive"),
    )


def _control(base: _Base, table: WeightTable, production: Producers) -> RunControl:
    return RunControl(
        ledger=base.store.ledger,
        journal=base.store,
        table=table,
        file_weights=dict(zip(base.names, base.config.data_source_weights, strict=True)),
        directory=base.directory,
        changed=base.changed,
        production=production,
        snapshot=base.store.snapshot,
        log=base.logs.logger("control"),
    )
