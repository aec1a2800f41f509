"""The methods of the consumer API that concern batches: get one, acknowledge it, give it back.

Invariants:

* A batch forms only while a ``get_batch`` waits for it.
* A lease is answered once it is written, and so is an acknowledgement.
* Every wait ends by its own deadline, by the end of its connection, or by the daemon's end; a timeout says the cause.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

import anyio
from structlog.typing import FilteringBoundLogger

from orchestrator.concurrency.broadcast import Broadcast
from orchestrator.consumer.handout import Handout, Handouts
from orchestrator.consumer.socket.connection import Answer, Connection
from orchestrator.consumer.waits import Waiting, Waits
from orchestrator.consumer.writing import kept
from orchestrator.core.ledger.groups import LocatedFrames, StoredGroup
from orchestrator.core.ledger.journal import Journal
from orchestrator.core.ledger.ledger import Ledger
from orchestrator.core.mixture.outlook import Finished, Shortage
from orchestrator.errors import BatchTimeout, RunFinished, ShuttingDown

from . import params as m
from .table import Method

__all__ = ["BatchMethods", "BatchStore"]

WRITE_PATIENCE_S: Final = 5.0
"""A batch that is formed is worth this wait for the disk, however short the trainer's own deadline is."""


class BatchStore(Journal, Protocol):
    """Where changes are recorded, and where stored frames lie."""

    async def located(self, groups: Sequence[StoredGroup]) -> LocatedFrames | None:
        """Where the frames of groups can be read, by descriptors that belong to the caller; ``None``: not now."""
        ...


class BatchMethods:
    """See the module's invariants.

    Args:
        ledger: the run's facts.
        store: where changes are recorded, and where stored frames lie.
        handouts: who gets what.
        waits: told of everybody who waits for a batch.
        changed: notified when a waiting ``get_batch`` should look again.
        is_draining: whether launching has stopped for good.
        cause: the sentence and the facts of why no batch is formed.
        routine: for who gets which batch.
    """

    def __init__(
        self,
        *,
        ledger: Ledger,
        store: BatchStore,
        handouts: Handouts,
        waits: Waits,
        changed: Broadcast,
        is_draining: Callable[[], bool],
        cause: Callable[[Waiting | Shortage | None], dict[str, Any]],
        routine: FilteringBoundLogger,
    ) -> None:
        self._ledger = ledger
        self._store = store
        self._handouts = handouts
        self._waits = waits
        self._changed = changed
        self._is_draining = is_draining
        self._cause = cause
        self._routine = routine
        self._marks: dict[int, int] = {}  # step → up to where the log has to be written before its batch is sent

    def methods(self) -> dict[str, Method]:
        """The parameters and the function of each method, by its name on the wire."""
        return {
            "get_batch": (m.GetBatch, self._get_batch),
            "ack": (m.Ack, self._ack),
            "nack": (m.Nack, self._nack),
            "cancel": (m.Cancel, self._cancel),
        }

    async def _get_batch(self, connection: Connection, params: m.GetBatch) -> Answer:
        limit = math.inf if params.timeout_s is None else params.timeout_s
        deadline = anyio.current_time() + limit
        while True:
            changed = self._changed.next()
            got = self._claim(connection, params)
            if isinstance(got, Handout):
                return await self._hand_out(got, limit, deadline, by_file=params.by_file)
            if isinstance(got, Finished):
                raise RunFinished(f"the run ended after {got.step} batches", data={"leftover": got.leftover})
            if self._is_draining():
                raise ShuttingDown("the daemon is draining and forms no more batches")
            with anyio.CancelScope(deadline=deadline) as waiting, self._waits.waiting(self._ledger.step, got):
                await changed.wait()
            if waiting.cancelled_caught:
                raise self._timeout(limit, got)

    def _claim(self, connection: Connection, params: m.GetBatch) -> Handout | Waiting | Shortage | Finished:
        """What this rank gets now; batches that change by it are handed out once that is written."""
        before = self._store.mark
        try:
            return self._handouts.claim(connection.holder, params.rank, params.world_size)
        finally:
            if self._store.mark != before:
                self._marks = dict.fromkeys(self._ledger.leases.batches, self._store.mark)

    async def _hand_out(self, handout: Handout, limit: float, deadline: float, *, by_file: bool) -> Answer:
        """The answer, once the lease is written; the share is free again if that takes too long.

        A batch that was written before this process began is handed out even while the disk is full.
        """
        patience, located = max(deadline, anyio.current_time() + WRITE_PATIENCE_S), None
        try:
            with anyio.CancelScope(deadline=patience) as writing:
                await self._store.written(self._marks.get(handout.batch.step, 0))
                if by_file:
                    located = await self._store.located(handout.share.groups)
        except BaseException:
            self._handouts.release(handout)
            raise
        if writing.cancelled_caught:
            self._handouts.release(handout)
            raise self._timeout(limit, None)
        batch, groups = handout.batch, handout.share.groups
        result = {
            "lease": handout.lease,
            "step": batch.step,
            "policy_version": batch.policy_version,
            "weights": batch.weights,
            "counts": batch.counts,
            "groups": len(groups),
        }
        self._routine.info(
            f"step {batch.step} was handed out to rank {handout.share.rank}, process {handout.holder.pid}",
            dataset="step.lease",
            action="handed_out",
            pid=handout.holder.pid,
            rollout={"step": batch.step, "policy_version": batch.policy_version},
            lease={"rank": handout.share.rank, "groups": len(groups)},
        )
        return Answer(
            result,
            frames=[group.frame for group in groups],
            lease=handout.lease,
            undo=lambda: self._handouts.release(handout),
            located=located,
        )

    def _timeout(self, seconds: float, why: Waiting | Shortage | None) -> BatchTimeout:
        cause = self._cause(why)
        return BatchTimeout(f"no batch within {seconds:g} s: {cause['sentence']}", data={"cause": cause})

    async def _ack(self, _: Connection, params: m.Ack) -> Answer:
        self._handouts.ack(params.lease)
        await kept(self._store, "the batch counts as trained on")
        return Answer({})

    async def _nack(self, _: Connection, params: m.Nack) -> Answer:
        self._handouts.nack(params.lease, discard=params.discard)
        await kept(self._store, "the batch is returned" if not params.discard else "the batch is dropped")
        return Answer({})

    async def _cancel(self, connection: Connection, params: m.Cancel) -> Answer:
        return Answer({"cancelled": connection.cancel(params.id)})
