"""Named checkpoints of a running daemon: saved beside the trainer's own, and gone back to.

Invariants:

* A checkpoint is of one moment between two records. Batches that the trainer has trained on by then count as
  acknowledged; other leases are part of it and are handed out again after it is loaded.
* Loading changes everything or nothing: it is checked wholly first. Afterwards all older leases have ended, and nothing
  is generated until it is known which parameters the engines hold.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import anyio
from structlog.typing import FilteringBoundLogger

from orchestrator.consumer import Handouts
from orchestrator.engines import EnginePool
from orchestrator.errors import BadRequest, CheckpointError, ShuttingDown, StateError
from orchestrator.production.producers import Producers
from orchestrator.state import StateStore, check_name, list_checkpoints, remove_checkpoint, verify_checkpoint

from .run import RunControl

__all__ = ["CheckpointControl"]

LOAD_DEADLINE_S = 300.0
"""From when the frames have been checked: parking, and two snapshots."""


class CheckpointControl:
    """Implements :class:`~orchestrator.consumer.methods.checkpoints.CheckpointControl`; see the module's invariants.

    Args:
        store: the state.
        handouts: the leases.
        production: the producers.
        pool: the engines.
        control: for the weights set at run time.
        kept: how many checkpoints are kept; ``None``: all.
        log: for what happened.
    """

    def __init__(
        self,
        *,
        store: StateStore,
        handouts: Handouts,
        production: Producers,
        pool: EnginePool,
        control: RunControl,
        kept: int | None,
        log: FilteringBoundLogger,
    ) -> None:
        self._store = store
        self._handouts = handouts
        self._production = production
        self._pool = pool
        self._control = control
        self._kept = kept
        self._log = log
        self._is_loading = False
        self._verifying: set[str] = set()

    async def save(self, name: str, trained_through: int | None) -> int:
        """Save a checkpoint; returns the step.

        Raises:
            BadRequest: it cannot be a checkpoint's name, or another one is being loaded.
            StateError: the disk failed.
        """
        self._check_free()
        check_name(name)
        if trained_through is not None:
            self._handouts.ack_through(trained_through)
        step = self._store.ledger.step
        await self._store.save_checkpoint(name)
        self._log.info(f"saved checkpoint {name} of step {step}", action="checkpoint_saved")
        await self._retain(name)
        return step

    async def _retain(self, newest: str) -> None:
        """Let the oldest go. Where that fails the one that was saved is there nevertheless."""
        if self._kept is None:
            return
        try:
            await self._remove_oldest(newest, self._kept)
        except OSError as error:
            self._log.warning(f"could not remove an old checkpoint, will retry at the next save: {error}")

    async def _remove_oldest(self, newest: str, kept: int) -> None:
        directory = self._store.directory
        facts = await anyio.to_thread.run_sync(list_checkpoints, directory)
        others = [fact for fact in facts if fact.name not in {newest, *self._verifying}]
        for fact in others[: max(0, len(facts) - kept)]:
            await anyio.to_thread.run_sync(remove_checkpoint, directory, fact.name)
            self._log.info(
                f"removed checkpoint {fact.name} of step {fact.step}: only {kept} are kept", action="checkpoint_removed"
            )

    async def load(self, name: str) -> int:
        """Go back to a checkpoint; returns its step.

        Raises:
            BadRequest: it cannot be a checkpoint's name, or another one is being loaded.
            CheckpointError: there is none of that name, it is damaged, or of another state.
            ForeignState: it is of other sources.
            StateError: the disk failed.
            ShuttingDown: the daemon is draining.
        """
        self._check_free()
        if self._control.is_draining:
            raise ShuttingDown("the daemon is draining: restart it, then load")
        await self._store.check_checkpoint(name)
        self._is_loading = True
        try:
            with anyio.CancelScope(shield=True):
                await self._production.park()
                await self._go_back(name)
        finally:
            self._is_loading = False
            self._production.start()
        ledger = self._store.ledger
        self._log.warning(
            f"loaded checkpoint {name}: step {ledger.step}, policy version {ledger.policy_version}. All older leases"
            " have ended. Nothing is generated until a policy version is set",
            action="checkpoint_loaded",
        )
        return ledger.step

    async def _go_back(self, name: str) -> None:
        with anyio.move_on_after(LOAD_DEADLINE_S) as deadline:
            await self._store.load_checkpoint(name)
        self._handouts.forget()
        self._control.restore_weights()
        self._pool.forget(self._store.ledger.policy_version)
        if deadline.cancelled_caught:
            raise StateError(
                f"checkpoint {name!r} is loaded, but this is not written to disk: {self._store.fault or 'it is slow'}."
                " Do not save the trainer until status.state.fault is null"
            )

    def _check_free(self) -> None:
        if self._is_loading:
            raise BadRequest("a checkpoint is being loaded; try again when it is done")

    async def checkpoints(self) -> list[dict[str, Any]]:
        """All checkpoints, in the order in which they were saved."""
        try:
            facts = await anyio.to_thread.run_sync(list_checkpoints, self._store.directory)
        except OSError as error:
            raise StateError(f"cannot list the checkpoints: {error}") from error
        return [asdict(fact) for fact in facts]

    async def verify(self, name: str | None) -> dict[str, list[str]]:
        """What is wrong with a checkpoint, or with each of them: sentences by name.

        Raises:
            CheckpointError: there is none of that name.
        """
        if name is not None:
            return {name: await self._verified(name)}
        names = [fact["name"] for fact in await self.checkpoints()]
        found = {}
        for name in names:
            try:
                found[name] = await self._verified(name)
            except CheckpointError as error:
                found[name] = [error.message]
        return found

    async def _verified(self, name: str) -> list[str]:
        self._verifying.add(name)
        try:
            return await anyio.to_thread.run_sync(verify_checkpoint, self._store.directory, name)
        except OSError as error:
            raise CheckpointError(f"cannot read checkpoint {name!r}: {error}") from error
        finally:
            self._verifying.discard(name)
