"""The daemon: opens the state, has the components built, supervises them.

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
from orchestrator.config import Config, Source, in_effect
from orchestrator.core.ledger.events import Archived, SourceFacts, SourcesChanged
from orchestrator.core.ledger.ledger import SourceSize
from orchestrator.core.ledger.source_changes import SourceChanges
from orchestrator.core.mixture.outlook import Finished
from orchestrator.daemon.control.reload import Reloader
from orchestrator.engines import PROBE_TEXT
from orchestrator.errors import ForeignState, OrchestratorError
from orchestrator.logs import LogHandle
from orchestrator.prompts import PromptSource
from orchestrator.sinks import read_steps
from orchestrator.state import SourceRules, StateLock, StateStore
from orchestrator.status import MAX_POINTS, StatusServer, step_point
from orchestrator.tokenizer import PromptTokenizer

from .assembly import Parts, assemble
from .source_lines import SourceLine

__all__ = ["Daemon"]

STOP_DEADLINE_S: Final = 30.0
"""From the first signal to the end of the process, but for a disk that does not answer."""

LAST_SNAPSHOT_DEADLINE_S: Final = 20.0
"""Within which the log is flushed and the last snapshot written."""

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
        with StateLock(self._config.run.state_dir):
            async with AsyncExitStack() as stack:
                changed, replan = Broadcast(), Broadcast()
                tokenizer = await self._open_tokenizer(stack)
                store, config, prompts = await self._open_state(stack, changed, replan)
                parts = assemble(
                    self._config,
                    config,
                    store=store,
                    prompts=prompts,
                    changed=changed,
                    replan=replan,
                    logs=self._logs,
                    directory=Path.cwd(),
                    file=self._file,
                    tokenizer=tokenizer,
                    probe_tokens=None if tokenizer is None else await tokenizer.tokenize(PROBE_TEXT),
                )
                await self._refill(parts, store.ledger.step)
                gc.collect()
                gc.freeze()  # what was read back lives long: looking through it would hold the loop up
                gc.set_threshold(*COLLECT_AFTER)
                stack.push_async_callback(self._close_lines, parts.lines)
                self._report_recovery(store)
                await self._supervise(parts, store, changed)
            self._log.info(f"stopped at step {store.ledger.step}; the next start goes on from there", action="stopped")

    async def _refill(self, parts: Parts, step: int) -> None:
        """The page goes on with the curves of before the restart."""
        if self._config.metrics.jsonl:
            rows = await anyio.to_thread.run_sync(read_steps, self._config.run.state_dir, MAX_POINTS)
            points = (step_point(row["step"], row["policy_version"], row["time"], row["metrics"]) for row in rows)
            parts.history.refill(points, below=step)

    async def _close_lines(self, lines: dict[str, SourceLine]) -> None:
        for line in lines.values():
            await line.aclose()

    async def _open_state(
        self, stack: AsyncExitStack, changed: Broadcast, replan: Broadcast
    ) -> tuple[StateStore, Config, dict[str, PromptSource]]:
        """The state, and the config with what the state knows of sources that came and went at run time."""
        config = self._config
        prompts = {source.name: await self._open_prompts(stack, source) for source in config.data_sources}
        sizes = {name: SourceSize(len(opened), opened.epochs) for name, opened in prompts.items()}

        def at_run_time(changes: SourceChanges) -> dict[str, SourceSize]:
            sources = in_effect(config, changes, directory=Path.cwd())[0].data_sources
            added = {name: SourceSize(added.rows, added.epochs) for name, added in changes.added.items()}
            known = added | sizes
            return {source.name: known[source.name]._replace(renamed_from=source.renamed_from) for source in sources}

        store = await StateStore.open(
            config.run.state_dir,
            sizes,
            changed=changed,
            replan=replan,
            log=self._logs.logger("state"),
            on_record=self._logs.recorded,
            rules=SourceRules(at_run_time, self._allow_source_changes),
        )
        stack.push_async_callback(self._close_store, store)
        now, outdated = in_effect(config, store.ledger.source_changes, directory=Path.cwd())
        for sentence in outdated.values():
            self._log.warning(sentence)
        for source in now.data_sources:
            if source.name not in prompts:
                prompts[source.name] = await self._open_prompts(stack, source)
        self._settle(store, prompts, list(outdated))
        return store, now, prompts

    def _settle(self, store: StateStore, prompts: dict[str, PromptSource], undone: list[str]) -> None:
        """The prompts of a source that was added at run time are read only now that the state has told of it."""
        facts = [SourceFacts(name, len(prompts[name]), prompts[name].epochs) for name in store.ledger.sources]
        other = [fact.name for fact in facts if fact.rows != store.ledger.sources[fact.name].rows]
        if other and not self._allow_source_changes:
            raise ForeignState(
                f"source {other[0]} was added at run time with {store.ledger.sources[other[0]].rows} prompts, and has"
                f" {len(prompts[other[0]])} now: put its prompt file back, or start with --allow-source-changes"
            )
        if other or undone:
            store.record(SourcesChanged(facts, undone=undone))

    async def _open_tokenizer(self, stack: AsyncExitStack) -> PromptTokenizer | None:
        chosen = self._config.tokenizer
        if chosen is None:
            return None
        tokenizer = await PromptTokenizer.open(
            chosen.path, chat_template=chosen.chat_template, add_generation_prompt=chosen.add_generation_prompt
        )
        stack.push_async_callback(tokenizer.aclose)
        return tokenizer

    async def _open_prompts(self, stack: AsyncExitStack, source: Source) -> PromptSource:
        prompts = await source.prompts.open(name=source.name, seed=self._config.run.seed)
        stack.push_async_callback(prompts.aclose)
        return prompts

    # -- supervision ---------------------------------------------------------------------------------------------------

    async def _supervise(self, parts: Parts, store: StateStore, changed: Broadcast) -> None:
        async with anyio.create_task_group() as tasks:
            await tasks.start(self._watch_signals, parts.reloader, tasks)
            await tasks.start(store.run)
            await tasks.start(parts.engines.run)
            await tasks.start(parts.starvation.run, parts.reporter.cause)
            # Before the socket: whoever is let in there may look here. Not ready until an engine is.
            if self._config.status.http is not None:
                samples = None if parts.archiver is None else parts.archiver.look
                page = StatusServer(self._config.status.http, parts.reporter.kept_status, parts.history, samples)
                await tasks.start(page.run)
            await tasks.start(parts.server.run)
            await tasks.start(parts.pool.run)
            await tasks.start(parts.production.run)
            await self._start_archive(parts, store, tasks)
            for feed in parts.feeds:
                await tasks.start(feed.run)
            tasks.start_soon(self._end_when_finished, parts, store, changed)
            self._log.info(
                f"ready: {len(parts.lines)} sources, step {store.ledger.step}, socket {self._config.consumer.socket}",
                action="ready",
            )
            await self._stop.wait()
            self._log.info("stopping: what is in flight is parked")
            with anyio.move_on_after(STOP_DEADLINE_S):
                await parts.production.stop()
            await self._flush(parts)
            tasks.cancel_scope.cancel()

    async def _flush(self, parts: Parts) -> None:
        """Bring what is left to the archive and to the sinks, side by side."""
        async with anyio.create_task_group() as tasks:
            for feed in parts.feeds:
                tasks.start_soon(feed.close)
            if parts.archiver is not None:
                with anyio.move_on_after(ARCHIVE_DEADLINE_S):
                    await parts.archiver.flush()
            tasks.cancel_scope.deadline = anyio.current_time() + SINKS_DEADLINE_S

    async def _start_archive(self, parts: Parts, store: StateStore, tasks: TaskGroup) -> None:
        if parts.archiver is not None:
            await tasks.start(parts.archiver.run)
            return
        waiting = list(store.ledger.unarchived.batches)
        for key in waiting:
            store.record(Archived(*key, is_given_up=True))
        if waiting:
            self._log.warning(
                f"{len(waiting)} batches, of steps {waiting[0].step} to {waiting[-1].step}, waited for an archive and"
                " are in none: `archive` is null now"
            )

    async def _end_when_finished(self, parts: Parts, store: StateStore, changed: Broadcast) -> None:
        """Stop once the run is finished, everything is acknowledged, and no client has come for a while."""
        connections = parts.service.connections
        while True:
            change = changed.next()
            is_done = isinstance(parts.mixer.outlook(), Finished) and not store.ledger.leases.batches
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
                    self._log.warning("a second signal: ending at once")
                    self._logs.close()
                    os._exit(1)
                else:
                    self._log.info(f"{signal.Signals(number).name}: stopping")
                    self._stop.set()

    async def _reload(self, reloader: Reloader) -> None:
        with suppress(OrchestratorError):  # it is in the log; nobody waits for an answer, and all is as it was
            await reloader.reload()

    async def _close_store(self, store: StateStore) -> None:
        is_written = False
        with anyio.CancelScope(shield=True), anyio.move_on_after(LAST_SNAPSHOT_DEADLINE_S):
            is_written = await store.aclose()
        if not is_written:
            self._log.error(
                f"the last snapshot was not written within {LAST_SNAPSHOT_DEADLINE_S:g} s ({store.fault});"
                " the next start replays the log"
            )

    def _report_recovery(self, store: StateStore) -> None:
        recovery = store.recovery
        for problem in recovery.problems:
            self._log.error(f"damaged state: {problem}")
        if not recovery.is_fresh:
            self._log.info(
                f"the run goes on at step {store.ledger.step}: snapshot {recovery.snapshot},"
                f" {recovery.records} records after it"
            )
