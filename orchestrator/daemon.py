"""The daemon: unpacks the config, joins the components, supervises them.

Invariants:

* Only this module knows the whole config; components take plain keyword values.
* One task group; a component that fails stops the daemon, a rollout that fails is data.
* The state lock is held before anything is read or bound, and until the last snapshot is written.
* Stopping: launching ends, what is in flight is parked, the last snapshot is written, all within a deadline. A second
  signal ends the process at once; the log has everything that was ever reported.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import anyio
from anyio.abc import TaskStatus

from . import __version__
from .broadcast import Broadcast
from .config import Config, sampling_header, sampling_params
from .consumer import ConsumerServer, ConsumerService, LeaseDesk, Waiting
from .control import Control
from .engines import EnginePool, build_engine
from .filters import RewardCaps, Verdict, load_filter
from .group_run import GroupRunner, GroupSettings
from .leases import LeasedBatch
from .ledger import SourceSize
from .logs import LogHandle
from .mixer import Finished, Mixer, Shortage
from .producer import Producer
from .prompts import PromptSource, open_prompts
from .records import Sample
from .rewards import Reward, build_reward
from .state import StateLock, StateStore
from .status import RunFacts, StatusServer, StepMetrics, build_status, explain
from .weights import WeightTable, parse_weight

__all__ = ["Daemon"]

STOP_DEADLINE_S: Final = 30.0
"""From the first signal to the end of the process, but for a disk that does not answer."""

LAST_SNAPSHOT_DEADLINE_S: Final = 20.0
"""Within which the log is flushed and the last snapshot written."""

LINGER_S: Final = 10.0
"""A finished run ends when no client has been connected for this long: ranks may still want to read the end."""


class Daemon:
    """One run, from the lock to the last snapshot; see the module's invariants.

    Args:
        config: the whole configuration.
        logs: where log lines go.
    """

    def __init__(self, config: Config, logs: LogHandle) -> None:
        self._config = config
        self._logs = logs
        self._log = logs.logger("daemon")
        self._changed = Broadcast()
        self._replan = Broadcast()
        self._stop = anyio.Event()
        self._producing = anyio.CancelScope()
        self._parked = anyio.Event()
        self._started = time.monotonic()
        self._cwd = Path.cwd()

    async def run(self) -> None:
        """Run until stopped by a signal, or until the run is finished.

        Raises:
            AlreadyRunning: another daemon holds the state directory or the socket.
            StateError: the state cannot be used.
            PromptFileError: a prompt file cannot be read.
        """
        with StateLock(self._config.run.state_dir):
            prompts = await self._open_prompts()
            sizes = {name: SourceSize(len(source), source.epochs) for name, source in prompts.items()}
            self._store = await StateStore.open(
                self._config.run.state_dir, sizes, changed=self._changed, replan=self._replan
            )
            async with AsyncExitStack() as stack:
                stack.push_async_callback(self._close_store)
                await self._assemble(prompts, stack)
                self._report_recovery()
                await self._supervise()

    # -- assembly ------------------------------------------------------------------------------------------------------

    async def _open_prompts(self) -> dict[str, PromptSource]:
        return {
            source.name: await open_prompts(
                name=source.name,
                path=source.prompts.path,
                input_key=source.prompts.input_key,
                label_key=source.prompts.label_key,
                metadata_key=source.prompts.metadata_key,
                shuffle=source.prompts.shuffle,
                epochs=source.prompts.epochs,
                seed=self._config.run.seed,
            )
            for source in self._config.data_sources
        }

    async def _assemble(self, prompts: dict[str, PromptSource], stack: AsyncExitStack) -> None:
        config = self._config
        ledger = self._ledger = self._store.ledger
        names = [source.name for source in config.data_sources]
        weights = [parse_weight(weight, directory=self._cwd) for weight in config.data_source_weights]
        self._caps = RewardCaps(names, config.data_source_reward_caps, directory=self._cwd)
        self._metrics = StepMetrics(ledger, self._caps.cap)
        self._mixer = Mixer(
            ledger=ledger,
            journal=self._store,
            table=WeightTable(names, weights),
            batch_size=config.rollout.rollout_batch_size,
            lookahead=config.rollout.lookahead,
            max_staleness=config.rollout.max_staleness,
            num_rollout=config.rollout.num_rollout,
            outstanding_bound=config.outstanding_bound,
            buffer_bounds={s.name: (s.buffer.groups, s.buffer.bytes) for s in config.data_sources},
            on_formed=self._batch_formed,
        )
        self._pool = self._build_pool()
        self._rewards: dict[str, Reward] = {}
        for source in config.data_sources:
            reward = self._rewards[source.name] = self._build_reward(source.name)
            stack.push_async_callback(reward.aclose)
        self._producers = {name: self._build_producer(name, prompts[name]) for name in names}
        self._control = Control(
            pool=self._pool,
            ledger=ledger,
            journal=self._store,
            table=self._mixer.table,
            file_weights=dict(zip(names, config.data_source_weights, strict=True)),
            directory=self._cwd,
            changed=self._changed,
            park=self._producing.cancel,
            log=self._logs.logger("control"),
        )
        self._control.restore_weights()
        self._desk = LeaseDesk(ledger=ledger, journal=self._store, mixer=self._mixer, changed=self._changed)
        self._service = ConsumerService(
            run_name=config.run.name,
            version=__version__,
            ledger=ledger,
            journal=self._store,
            desk=self._desk,
            control=self._control,
            changed=self._changed,
            status=self.status,
            cause=self._cause,
        )
        self._server = ConsumerServer(
            config.consumer.socket,
            self._service,
            max_connections=config.consumer.max_connections,
            log=self._logs.logger("consumer"),
        )

    def _build_pool(self) -> EnginePool:
        config = self._config
        return EnginePool(
            [build_engine(spec, workdir=config.run.state_dir) for spec in config.engine_options()],
            request_timeout_s=config.engine_defaults.request_timeout_s,
            stall_s=config.engine_defaults.stall_s,
            max_retries=config.engine_defaults.max_retries,
            chunk_tokens=config.rollout.chunk_tokens,
            keep_partials=config.rollout.partial_rollout,
            policy_version=lambda: self._ledger.policy_version,
            seed=config.run.seed,
            log=self._logs.logger("engines"),
        )

    def _build_reward(self, source: str) -> Reward:
        spec = self._config.source(source).reward
        return build_reward(
            spec.path, key=spec.key, timeout_s=spec.timeout_s, concurrency=spec.concurrency, directory=self._cwd
        )

    def _build_producer(self, source: str, prompts: PromptSource) -> Producer:
        config = self._config
        log = self._logs.logger("producer", source=source)
        sampling = config.sampling_of(source)
        runner = GroupRunner(
            prompts=prompts,
            pool=self._pool,
            reward=self._rewards[source],
            verdict=self._verdict(source),
            journal=self._store,
            policy_version=lambda: self._ledger.policy_version,
            settings=GroupSettings(
                sampling=sampling_params(sampling, seed=config.run.seed),
                sampling_header=sampling_header(sampling),
                replace_failed=config.rollout.failed_sample == "replace",
                mask_offpolicy=config.rollout.mask_offpolicy_in_partial_rollout,
                max_staleness=config.rollout.max_staleness,
                logprobs_kind=config.logprobs_kind,
            ),
            log=log,
        )
        return Producer(
            state=self._ledger.source(source),
            ledger=self._ledger,
            journal=self._store,
            prompts=prompts,
            runner=runner,
            demand=lambda: self._mixer.demand(source),
            replan=self._replan,
            n_samples=config.rollout.n_samples_per_prompt,
            may_launch=lambda: not self._control.is_draining and not self._store.is_congested,
            log=log,
        )

    def _verdict(self, source: str) -> Callable[[Sequence[Sample]], Verdict]:
        """The filter of a source: its reward cap, then the configured filter."""
        chosen = load_filter(self._config.dynamic_sampling_filter, directory=self._cwd)
        args = SimpleNamespace(
            data_source=source,
            n_samples_per_prompt=self._config.rollout.n_samples_per_prompt,
            rollout_batch_size=self._config.rollout.rollout_batch_size,
        )

        def verdict(samples: Sequence[Sample]) -> Verdict:
            capped = self._caps.check(self._ledger.step, source, samples)
            return chosen(args, list(samples)) if capped.keep else capped

        return verdict

    # -- supervision ---------------------------------------------------------------------------------------------------

    async def _supervise(self) -> None:
        async with anyio.create_task_group() as tasks:
            await tasks.start(self._watch_signals)
            await tasks.start(self._store.run)
            await tasks.start(self._control.run)
            await tasks.start(self._server.run)
            await tasks.start(self._pool.run)
            await tasks.start(self._produce)
            if self._config.status.http is not None:
                await tasks.start(StatusServer(self._config.status.http, self.status).run)
            tasks.start_soon(self._end_when_finished)
            self._log.info(
                f"ready: {len(self._producers)} sources, step {self._ledger.step},"
                f" socket {self._config.consumer.socket}"
            )
            await self._stop.wait()
            self._log.info("stopping: what is in flight is parked")
            self._producing.cancel()
            with anyio.move_on_after(STOP_DEADLINE_S):
                await self._parked.wait()
            tasks.cancel_scope.cancel()

    async def _produce(self, *, task_status: TaskStatus[None]) -> None:
        """Run the producers until they are cancelled; then everything in flight is parked."""
        with self._producing:
            async with anyio.create_task_group() as producers:
                for producer in self._producers.values():
                    await producers.start(producer.run)
                task_status.started()
        self._parked.set()
        await self._store.snapshot()
        self._control.drained()

    async def _end_when_finished(self) -> None:
        """Stop once the run is finished, everything is acknowledged, and no client has come for a while."""
        while True:
            changed = self._changed.next()
            is_done = isinstance(self._mixer.outlook(), Finished) and not self._ledger.leases.batches
            if not is_done or self._service.connections:
                await changed.wait()
                continue
            with anyio.move_on_after(LINGER_S) as linger:
                await changed.wait()
            if linger.cancelled_caught and not self._service.connections:
                self._log.info(f"the run is finished after {self._ledger.step} batches")
                self._stop.set()
                return

    async def _watch_signals(self, *, task_status: TaskStatus[None]) -> None:
        watched = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
        with anyio.open_signal_receiver(*watched) as signals:
            task_status.started()
            async for number in signals:
                if number == signal.SIGUSR1:
                    self._logs.reopen()
                elif number == signal.SIGHUP:
                    self._log.warning("this version does not reload its config: restart the daemon to apply changes")
                elif self._stop.is_set():
                    self._log.warning("a second signal: ending at once")
                    self._logs.close()
                    os._exit(1)
                else:
                    self._log.info(f"{signal.Signals(number).name}: stopping")
                    self._stop.set()

    async def _close_store(self) -> None:
        with anyio.CancelScope(shield=True), anyio.move_on_after(LAST_SNAPSHOT_DEADLINE_S) as deadline:
            await self._store.aclose()
        if deadline.cancelled_caught:
            self._log.error(
                f"the last snapshot was not written within {LAST_SNAPSHOT_DEADLINE_S:g} s ({self._store.fault});"
                " the next start replays the log"
            )

    # -- what is said --------------------------------------------------------------------------------------------------

    def _report_recovery(self) -> None:
        recovery = self._store.recovery
        for problem in recovery.problems:
            self._log.error(f"damaged state: {problem}")
        if not recovery.is_fresh:
            self._log.info(
                f"the run goes on at step {self._ledger.step}: snapshot {recovery.snapshot},"
                f" {recovery.records} records after it"
            )

    def _batch_formed(self, batch: LeasedBatch) -> None:
        row = self._mixer.table.at(batch.step)
        for warning in (*row.warnings, *self._caps.warnings(batch.step)):
            self._log.warning(warning)
        self._logs.step(self._metrics.report(batch))

    def _cause(self, why: Waiting | Shortage | None) -> dict[str, Any]:
        return explain(
            waiting=why.reason if isinstance(why, Waiting) else None,
            shortage=why if isinstance(why, Shortage) else None,
            ledger=self._ledger,
            producers={name: producer.statistics() for name, producer in self._producers.items()},
            rewards={name: reward.statistics() for name, reward in self._rewards.items()},
            engines=self._pool.statistics(),
            is_paused=self._control.is_paused,
            is_draining=self._control.is_draining,
            disk_fault=self._store.fault,
        )

    def status(self) -> dict[str, Any]:
        """Everything that ``orchestrator status --json`` prints."""
        facts = RunFacts(
            run={
                "name": self._config.run.name,
                "version": __version__,
                "pid": os.getpid(),
                "uptime_s": round(time.monotonic() - self._started, 3),
                "num_rollout": self._config.rollout.num_rollout,
                "rollout_batch_size": self._config.rollout.rollout_batch_size,
                "n_samples_per_prompt": self._config.rollout.n_samples_per_prompt,
            },
            ledger=self._ledger,
            mixer=self._mixer,
            producers={name: producer.statistics() for name, producer in self._producers.items()},
            rewards={name: reward.statistics() for name, reward in self._rewards.items()},
            engines=self._pool.statistics(),
            generation={
                "in_flight": self._control.in_flight(),
                "paused": self._control.is_paused,
                "draining": self._control.is_draining,
            },
            held={lease: holder.pid for lease, holder in self._desk.held.items()},
            connections=[{"pid": c.holder.pid, "client": c.client} for c in self._service.connections.values()],
            state=asdict(self._store.statistics()),
            problems=self._store.recovery.problems,
        )
        return build_status(facts, self._cause)
