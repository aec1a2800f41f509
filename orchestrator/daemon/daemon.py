"""The daemon: holds the lock, has everything opened and built, supervises it.

Invariants:

* One task group; a component that fails stops the daemon, a rollout that fails is data.
* The state lock is held before anything is read or bound, and until the last snapshot is written.
* Stopping: launching ends, what is in flight is parked, the last snapshot is written, all within a deadline. A second
  signal ends the process at once; the log has everything that was ever reported.
"""

from __future__ import annotations

import gc
import os
import signal
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Final

import anyio
from anyio.abc import TaskGroup, TaskStatus

from orchestrator.concurrency.broadcast import Broadcast
from orchestrator.config import Config
from orchestrator.core.ledger.events import Archived
from orchestrator.core.mixture.outlook import Finished
from orchestrator.daemon.control.reload import Reloader
from orchestrator.errors import OrchestratorError
from orchestrator.logs import LogHandle
from orchestrator.sinks import read_steps
from orchestrator.state import StateLock, StateStore
from orchestrator.status import MAX_POINTS, StatusServer, step_point

from .assembly import Parts, assemble
from .opening import Opened, Opening, report_recovery
from .parts import OutputParts
from .settings import start_settings
from .source_pipeline import SourcePipeline

__all__ = ["Daemon"]

STOP_DEADLINE_S: Final = 30.0
"""From the first signal to the end of the process, but for a disk that does not answer."""

SINKS_DEADLINE_S: Final = 10.0
"""At the end, for the sinks of the metrics: some packages take seconds to end a run."""

ARCHIVE_DEADLINE_S: Final = 5.0
"""At the end, for the archive; what it does not get within it waits in the state for the next start."""

COLLECT_AFTER: Final = (10_000, 200, 2)
"""Thresholds of the collector of cycles (``gc.set_threshold``). A generation in flight is some hundred objects and no
cycle: with Python's own thresholds all those in flight are looked through again and again, which holds the loop up. The
youngest are looked through 10,000 at a time, in 5 to 18 ms, and what is left of them when there are two million: with
thousands in flight that takes tenths of a second. Garbage that does form cycles is bounded by the thresholds' product,
four million objects."""

LINGER_S: Final = 10.0
"""A finished run ends when no client has been connected for this long: ranks may still want to read the end."""

LOOK_AGAIN_S: Final = 0.05
"""Whether the run is finished is not looked at for each of the records that come at once."""


class Daemon:
    """One run, from the lock to the last snapshot; see the module's invariants.

    Args:
        config: the whole configuration.
        logs: where log lines go.
        file: that the config was read from; without it it cannot be read again.
        allow_source_changes: go on with the state of a run whose sources were others.
    """

    def __init__(
        self, config: Config, logs: LogHandle, *, file: Path | None = None, allow_source_changes: bool = False
    ) -> None:
        self._config = config
        self._settings = start_settings(config)
        self._file = file
        self._allow_source_changes = allow_source_changes
        self._logs = logs
        self._log = logs.logger("daemon")
        self._stop = anyio.Event()

    async def run(self) -> None:
        """Run until stopped by a signal, or until the run is finished.

        Raises:
            AlreadyRunning: another daemon holds the state directory or the socket.
            StateError: the state cannot be used.
            PromptFileError: a prompt file cannot be read.
            TokenizerError: the run's own tokenizer cannot be loaded.
        """
        with StateLock(self._settings.state_dir):
            async with AsyncExitStack() as stack:
                changed, replan = Broadcast(), Broadcast()
                opened = await self._open(stack, changed, replan)
                store = opened.store
                parts = assemble(
                    self._config,
                    opened,
                    changed=changed,
                    replan=replan,
                    logs=self._logs,
                    directory=Path.cwd(),
                    file=self._file,
                )
                await self._refill(parts, store.ledger.step)
                gc.collect()
                gc.freeze()  # what was read back lives long: looking through it would hold the loop up
                gc.set_threshold(*COLLECT_AFTER)
                stack.push_async_callback(self._close_pipelines, parts.sources.pipelines)
                report_recovery(store, self._log)
                await self._supervise(parts, store, changed)
            self._log.info(
                f"stopped at step {store.ledger.step}; the next start continues from there", action="stopped"
            )

    async def _open(self, stack: AsyncExitStack, changed: Broadcast, replan: Broadcast) -> Opened:
        opening = Opening(
            self._config,
            self._logs,
            changed=changed,
            replan=replan,
            directory=Path.cwd(),
            allow_source_changes=self._allow_source_changes,
        )
        return await opening.open(stack)

    async def _refill(self, parts: Parts, step: int) -> None:
        """The page goes on with the curves of before the restart."""
        if self._settings.figures.file is not None:
            rows = await anyio.to_thread.run_sync(read_steps, self._settings.state_dir, MAX_POINTS)
            points = (step_point(row["step"], row["policy_version"], row["time"], row["metrics"]) for row in rows)
            parts.outputs.history.refill(points, below=step)

    async def _close_pipelines(self, pipelines: dict[str, SourcePipeline]) -> None:
        for pipeline in pipelines.values():
            await pipeline.aclose()

    # -- supervision ---------------------------------------------------------------------------------------------------

    async def _supervise(self, parts: Parts, store: StateStore, changed: Broadcast) -> None:
        async with anyio.create_task_group() as tasks:
            await tasks.start(self._watch_signals, parts.reloader, tasks)
            await tasks.start(parts.outputs.loop.run)
            await tasks.start(store.run)
            await tasks.start(parts.engines.control.run)
            await tasks.start(parts.trainer.starvation.run, parts.reporter.cause)
            # Before the socket: whoever is let in there may look here. Not ready until an engine is.
            if self._settings.status_http is not None:
                archiver = parts.outputs.archiver
                samples = None if archiver is None else archiver.look
                history = parts.outputs.history
                page = StatusServer(self._settings.status_http, parts.reporter.kept_status, history, samples)
                await tasks.start(page.run)
            await tasks.start(parts.server.run)
            await tasks.start(parts.engines.pool.run)
            await tasks.start(parts.sources.producers.run)
            await self._start_archive(parts, store, tasks)
            for feed in parts.outputs.feeds:
                await tasks.start(feed.run)
            tasks.start_soon(self._end_when_finished, parts, store, changed)
            count, socket = len(parts.sources.pipelines), self._settings.socket.path
            self._log.info(f"ready: {count} sources, step {store.ledger.step}, socket {socket}", action="ready")
            await self._stop.wait()
            self._log.info("stopping: saving what is in flight")
            with anyio.move_on_after(STOP_DEADLINE_S):
                await parts.sources.producers.stop()
            await self._flush(parts.outputs)
            tasks.cancel_scope.cancel()

    async def _flush(self, outputs: OutputParts) -> None:
        """Bring what is left to the archive and to the sinks, side by side."""
        async with anyio.create_task_group() as tasks:
            for feed in outputs.feeds:
                tasks.start_soon(feed.close)
            if outputs.archiver is not None:
                with anyio.move_on_after(ARCHIVE_DEADLINE_S):
                    await outputs.archiver.flush()
            tasks.cancel_scope.deadline = anyio.current_time() + SINKS_DEADLINE_S

    async def _start_archive(self, parts: Parts, store: StateStore, tasks: TaskGroup) -> None:
        if parts.outputs.archiver is not None:
            await tasks.start(parts.outputs.archiver.run)
            return
        waiting = list(store.ledger.unarchived.batches)
        for key in waiting:
            store.record(Archived(*key, is_given_up=True))
        if waiting:
            self._log.warning(
                f"{len(waiting)} batches, of steps {waiting[0].step} to {waiting[-1].step}, were waiting for the"
                " archive and will not be archived, because `archive` is now null"
            )

    async def _end_when_finished(self, parts: Parts, store: StateStore, changed: Broadcast) -> None:
        """Stop once the run is finished, everything is acknowledged, and no client has come for a while."""
        connections = parts.trainer.connections
        while True:
            change = changed.next()
            is_done = isinstance(parts.sources.mixer.outlook(), Finished) and not store.ledger.leases.batches
            if not is_done or connections:
                await change.wait()
                await anyio.sleep(LOOK_AGAIN_S)
                continue
            with anyio.move_on_after(LINGER_S) as linger:
                await change.wait()
            if linger.cancelled_caught and not connections:
                self._log.info(f"the run is finished after {store.ledger.step} batches", action="finished")
                self._stop.set()
                return

    async def _watch_signals(self, reloader: Reloader, tasks: TaskGroup, *, task_status: TaskStatus[None]) -> None:
        watched = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
        with anyio.open_signal_receiver(*watched) as signals:
            task_status.started()
            async for number in signals:
                if number == signal.SIGUSR1:
                    self._logs.reopen()
                elif number == signal.SIGHUP:
                    tasks.start_soon(self._reload, reloader)
                elif self._stop.is_set():
                    self._log.warning("second signal: stopping at once")
                    self._logs.close()
                    os._exit(1)
                else:
                    self._log.info(f"{signal.Signals(number).name}: stopping")
                    self._stop.set()

    async def _reload(self, reloader: Reloader) -> None:
        with suppress(OrchestratorError):  # it is in the log; nobody waits for an answer, and all is as it was
            await reloader.reload()
