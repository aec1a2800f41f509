"""What is opened before anything is built: tokenizer, prompts, state, and which sources there are by now.

Invariants:

* The caller holds the lock of the state directory.
* What was opened is closed by the exit stack that it was entered in, in reverse order; the state's last snapshot is
  shielded, with a deadline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import anyio
from structlog.typing import FilteringBoundLogger

from orchestrator.concurrency.broadcast import Broadcast
from orchestrator.config import Config, in_effect
from orchestrator.core.ledger.ledger import SourceSize
from orchestrator.core.ledger.source_changes import SourceChanges
from orchestrator.daemon.control.sources import settle_sources
from orchestrator.engines import PROBE_TEXT
from orchestrator.logs import LogHandle
from orchestrator.prompts import PromptSource
from orchestrator.state import SourceRules, StateStore
from orchestrator.tokenizer import PromptTokenizer

from .settings import source_settings, start_settings

__all__ = ["Opened", "Opening", "report_recovery"]

LAST_SNAPSHOT_DEADLINE_S: Final = 20.0
"""Within which the log is flushed and the last snapshot written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """What a run begins with.

    ``config`` is the file's with what was done to its sources at run time; ``prompts`` are by source, all of ``config``
    and those of the file; ``tokenizer`` is the run's own, ``None``: the engines tokenise; ``probe_tokens`` is what it
    makes of the text that engines are probed with.
    """

    config: Config
    store: StateStore
    prompts: Mapping[str, PromptSource]
    tokenizer: PromptTokenizer | None
    probe_tokens: Sequence[int] | None


class Opening:
    """Opens what a config names; see the module's invariants.

    Args:
        config: the file's.
        logs: where lines go.
        changed: notified of every record.
        replan: notified of what concerns all producers.
        directory: what relative paths of sources that were added at run time are relative to.
        allow_source_changes: go on with the state of a run whose sources were others.
    """

    def __init__(
        self,
        config: Config,
        logs: LogHandle,
        *,
        changed: Broadcast,
        replan: Broadcast,
        directory: Path,
        allow_source_changes: bool,
    ) -> None:
        self._config = config
        self._logs = logs
        self._log = logs.logger("daemon")
        self._changed = changed
        self._replan = replan
        self._directory = directory
        self._allow_source_changes = allow_source_changes

    async def open(self, stack: AsyncExitStack) -> Opened:
        """Open everything; what was opened before an error is closed by the stack.

        Raises:
            TokenizerError: the run's own tokenizer cannot be loaded.
            PromptFileError: prompts cannot be read.
            StateError: the state cannot be used, or is of other sources.
        """
        tokenizer = await self._open_tokenizer(stack)
        prompts = {name: await self._open_prompts(stack, self._config, name) for name in self._config.source_names}
        store = await self._open_state(stack, prompts)
        config, outdated = in_effect(self._config, store.ledger.source_changes, directory=self._directory)
        for sentence in outdated.values():
            self._log.warning(sentence)
        for name in config.source_names:
            if name not in prompts:  # added at run time: the state has told of it only now
                prompts[name] = await self._open_prompts(stack, config, name)
        found = {name: SourceSize(len(prompts[name]), prompts[name].epochs) for name in store.ledger.sources}
        settle_sources(store, found, undone=list(outdated), allow_source_changes=self._allow_source_changes)
        return Opened(
            config=config,
            store=store,
            prompts=prompts,
            tokenizer=tokenizer,
            probe_tokens=None if tokenizer is None else await tokenizer.tokenize(PROBE_TEXT),
        )

    async def _open_tokenizer(self, stack: AsyncExitStack) -> PromptTokenizer | None:
        chosen = start_settings(self._config).tokenizer
        if chosen is None:
            return None
        tokenizer = await PromptTokenizer.open(
            chosen.path, chat_template=chosen.chat_template, add_generation_prompt=chosen.add_generation_prompt
        )
        stack.push_async_callback(tokenizer.aclose)
        return tokenizer

    async def _open_prompts(self, stack: AsyncExitStack, config: Config, source: str) -> PromptSource:
        settings = source_settings(config, source)
        prompts = await settings.prompts.open(name=source, seed=settings.seed)
        stack.push_async_callback(prompts.aclose)
        return prompts

    async def _open_state(self, stack: AsyncExitStack, prompts: Mapping[str, PromptSource]) -> StateStore:
        sizes = {name: SourceSize(len(opened), opened.epochs) for name, opened in prompts.items()}

        def at_run_time(changes: SourceChanges) -> dict[str, SourceSize]:
            sources = in_effect(self._config, changes, directory=self._directory)[0].data_sources
            added = {name: SourceSize(added.rows, added.epochs) for name, added in changes.added.items()}
            known = added | sizes
            return {source.name: known[source.name]._replace(renamed_from=source.renamed_from) for source in sources}

        store = await StateStore.open(
            self._config.run.state_dir,
            sizes,
            changed=self._changed,
            replan=self._replan,
            log=self._logs.logger("state"),
            on_record=self._logs.recorded,
            rules=SourceRules(at_run_time, self._allow_source_changes),
        )
        stack.push_async_callback(self._close_state, store)
        return store

    async def _close_state(self, store: StateStore) -> None:
        is_written = False
        with anyio.CancelScope(shield=True), anyio.move_on_after(LAST_SNAPSHOT_DEADLINE_S):
            is_written = await store.aclose()
        if not is_written:
            self._log.error(
                f"the last snapshot was not written within {LAST_SNAPSHOT_DEADLINE_S:g} s ({store.fault});"
                " the next start replays the log"
            )


def report_recovery(store: StateStore, log: FilteringBoundLogger) -> None:
    """Say what was found damaged, and where the run goes on."""
    recovery = store.recovery
    for problem in recovery.problems:
        log.error(f"damaged state: {problem}")
    if not recovery.is_fresh:
        log.info(
            f"resuming at step {store.ledger.step} from snapshot {recovery.snapshot}"
            f" and {recovery.records} later records"
        )
