"""The methods of the consumer API: what each request does.

Invariants:

* Nothing is answered before what it reports is written: a lease, an acknowledgement, a version, a weight.
* A batch forms only while a ``get_batch`` waits for it.
* Every wait ends by its own deadline, by the end of its connection, or by the daemon's end; a timeout says the cause.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol, cast

import anyio
from structlog.typing import FilteringBoundLogger

from orchestrator.concurrency.broadcast import Broadcast
from orchestrator.consumer.methods.checkpoints import CheckpointControl, CheckpointMethods
from orchestrator.consumer.methods.engines import EngineControl, EngineMethods, Method
from orchestrator.consumer.methods.sources import SourceControl, SourceMethods
from orchestrator.consumer.socket.connection import Answer, Connection
from orchestrator.consumer.socket.requests import Request
from orchestrator.core.ledger.events import SourcePaused, SourceResumed
from orchestrator.core.ledger.groups import LocatedFrames, StoredGroup
from orchestrator.core.ledger.journal import Journal
from orchestrator.core.ledger.ledger import Ledger
from orchestrator.core.mixture.outlook import Finished, Shortage
from orchestrator.errors import BadRequest, BatchTimeout, RankInUse, RunFinished, ShuttingDown
from orchestrator.frames import DEFAULT_MAX_PAYLOAD_BYTES

from .handout import Handout, Handouts
from .methods import params as m
from .waits import Waiting, Waits
from .writing import kept

__all__ = ["ConsumerService", "RunControl"]

PROTOCOL = 1

MAX_CLIENT_CHARS = 80
"""Of the name that a client gives itself: the names of all of them are in one status."""

WRITE_PATIENCE_S = 5.0
"""A batch that is formed is worth this wait for the disk, however short the trainer's own deadline is."""


class RunControl(Protocol):
    """What the service may ask of the run, beside its engines."""

    @property
    def is_draining(self) -> bool:
        """Whether launching has stopped for good."""
        ...

    async def drain(self) -> None:
        """Stop launching, park what is in flight, snapshot."""
        ...

    def set_weight(self, source: str, weight: float | str | None, *, by: str) -> None:
        """Put a weight in force, and record it."""
        ...

    def audit(self, what: str, by: str) -> None:
        """Say in the log what was done to the run, and by whom."""
        ...


class FrameFiles(Protocol):
    """Where stored frames lie."""

    async def located(self, groups: Sequence[StoredGroup]) -> LocatedFrames | None:
        """Where the frames of groups can be read, by descriptors that belong to the caller; ``None``: not now."""
        ...


class ConsumerService:
    """See the module's invariants.

    Args:
        run_name: the run's name, for ``hello``.
        version: the server's version, for ``hello``.
        ledger: the run's facts.
        journal: where changes are recorded.
        files: where stored frames lie.
        handouts: who gets what.
        control: weights and drain.
        engines: the engines' side.
        checkpoints: named checkpoints.
        waits: told of everybody who waits for a batch.
        sources: the config file, and the sources.
        changed: notified when a waiting ``get_batch`` should look again.
        status: everything that ``status`` reports, all of it written, with the figures of that many of the last steps.
        cause: the sentence and the facts of why no batch is formed.
        connections: filled with the live connections, by number.
        log: for what happens to connections.
        routine: for who gets which batch.
    """

    def __init__(
        self,
        *,
        run_name: str,
        version: str,
        ledger: Ledger,
        journal: Journal,
        files: FrameFiles,
        handouts: Handouts,
        control: RunControl,
        engines: EngineControl,
        checkpoints: CheckpointControl,
        waits: Waits,
        sources: SourceControl,
        changed: Broadcast,
        status: Callable[[int], Awaitable[dict[str, Any]]],
        cause: Callable[[Waiting | Shortage | None], dict[str, Any]],
        connections: dict[int, Connection],
        log: FilteringBoundLogger,
        routine: FilteringBoundLogger,
    ) -> None:
        self._run_name = run_name
        self._version = version
        self._ledger = ledger
        self._journal = journal
        self._files = files
        self._handouts = handouts
        self._control = control
        self._engines = engines
        self._waits = waits
        self._marks: dict[int, int] = {}  # step → up to where the log has to be written before its batch is sent
        self._changed = changed
        self._log = log
        self._routine = routine
        self._status = status
        self._cause = cause
        self._methods: dict[str, Method] = {
            "hello": (m.Hello, self._hello),
            "get_batch": (m.GetBatch, self._get_batch),
            "ack": (m.Ack, self._ack),
            "nack": (m.Nack, self._nack),
            "cancel": (m.Cancel, self._cancel),
            **EngineMethods(engines, journal).methods(),
            **CheckpointMethods(checkpoints).methods(),
            **SourceMethods(sources, ledger).methods(),
            "status": (m.Status, self._report_status),
            "set_weight": (m.SetWeight, self._set_weight),
            "pause": (m.Source, self._pause),
            "resume": (m.Source, self._resume),
            "drain": (m.NoParams, self._drain),
        }
        self.connections = connections

    async def handle(self, connection: Connection, request: Request) -> Answer:
        """Do what a request asks.

        Raises:
            OrchestratorError: its code and message are the answer.
        """
        if request.method not in self._methods:
            raise BadRequest(f"no method {request.method[:80]!r}; there are {', '.join(self._methods)}")
        kind, method = self._methods[request.method]
        return await method(connection, m.parse_params(kind, request.method, request.params))

    def opened(self, connection: Connection) -> None:
        """A client connected."""
        self.connections[connection.holder.connection] = connection

    def closed(self, connection: Connection) -> None:
        """A client went: its leases are free, its pause ends."""
        del self.connections[connection.holder.connection]
        if leases := self._handouts.leases_of(connection.holder):
            self._log.info(
                f"{_who(connection)} has gone with {len(leases)} leases, which will be handed out again",
                action="left",
                pid=connection.holder.pid,
            )
        self._handouts.leave(connection.holder)
        self._engines.left(connection.holder.connection)

    def holds_nothing(self, connection: Connection) -> bool:
        """Whether closing the connection costs its client no more than connecting again."""
        holder = connection.holder
        return not (
            connection.is_waiting or self._handouts.is_used_by(holder) or self._engines.is_paused_by(holder.connection)
        )

    def is_at_work(self, connection: Connection) -> bool:
        """Whether the client has a batch in hand that was sent to it whole."""
        connection.delivered &= self._handouts.leases_of(connection.holder)
        return bool(connection.delivered)

    # -- methods -------------------------------------------------------------------------------------------------------

    async def _hello(self, connection: Connection, params: m.Hello) -> Answer:
        if params.protocol != PROTOCOL:
            raise BadRequest(f"protocol {params.protocol} is not spoken here, {PROTOCOL} is")
        connection.client = "".join(c if c.isprintable() else "?" for c in params.client[:MAX_CLIENT_CHARS])
        if params.rank is not None:
            displaced = self._handouts.take_rank(connection.holder, params.rank, takeover=params.takeover)
            if displaced is not None and displaced.connection in self.connections:
                self.connections[displaced.connection].close(_taken_over(params.rank, connection))
        return Answer(
            {
                "server": "rollout-orchestrator",
                "version": self._version,
                "protocol": PROTOCOL,
                "max_payload": DEFAULT_MAX_PAYLOAD_BYTES,
                "run": self._run_name,
                "sources": list(self._ledger.sources),
                "step": self._ledger.step,
                "policy_version": self._ledger.policy_version,
                "by_file": True,
            }
        )

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
            if self._control.is_draining:
                raise ShuttingDown("the daemon is draining and forms no more batches")
            with anyio.CancelScope(deadline=deadline) as waiting, self._waits.waiting(self._ledger.step, got):
                await changed.wait()
            if waiting.cancelled_caught:
                raise self._timeout(limit, got)

    def _claim(self, connection: Connection, params: m.GetBatch) -> Handout | Waiting | Shortage | Finished:
        """What this rank gets now; batches that change by it are handed out once that is written."""
        before = self._journal.mark
        try:
            return self._handouts.claim(connection.holder, params.rank, params.world_size)
        finally:
            if self._journal.mark != before:
                self._marks = dict.fromkeys(self._ledger.leases.batches, self._journal.mark)

    async def _hand_out(self, handout: Handout, limit: float, deadline: float, *, by_file: bool) -> Answer:
        """The answer, once the lease is written; the share is free again if that takes too long.

        A batch that was written before this process began comes from a full disk too.
        """
        patience, located = max(deadline, anyio.current_time() + WRITE_PATIENCE_S), None
        try:
            with anyio.CancelScope(deadline=patience) as writing:
                await self._journal.written(self._marks.get(handout.batch.step, 0))
                if by_file:
                    located = await self._files.located(handout.share.groups)
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
            f"step {batch.step} is handed out to rank {handout.share.rank}, process {handout.holder.pid}",
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
        await kept(self._journal, "the batch counts as trained on")
        return Answer({})

    async def _nack(self, _: Connection, params: m.Nack) -> Answer:
        self._handouts.nack(params.lease, discard=params.discard)
        await kept(self._journal, "the batch is given back" if not params.discard else "the batch is dropped")
        return Answer({})

    async def _cancel(self, connection: Connection, params: m.Cancel) -> Answer:
        return Answer({"cancelled": connection.cancel(params.id)})

    async def _report_status(self, _: Connection, params: m.Status) -> Answer:
        return Answer(await self._status(params.history))

    async def _set_weight(self, connection: Connection, params: m.SetWeight) -> Answer:
        self._control.set_weight(params.source, params.weight, by=_who(connection))
        await kept(self._journal, f"the weight of {params.source} is set")
        return Answer({"step": self._ledger.step})

    async def _pause(self, connection: Connection, params: m.Source) -> Answer:
        return await self._set_paused(connection, params.source, paused=True)

    async def _resume(self, connection: Connection, params: m.Source) -> Answer:
        return await self._set_paused(connection, params.source, paused=False)

    async def _set_paused(self, connection: Connection, source: str, *, paused: bool) -> Answer:
        if self._ledger.source(source).paused != paused:
            event = SourcePaused if paused else SourceResumed
            self._journal.record(cast("Any", event)(source=source))
            self._control.audit(f"{source} {'is paused' if paused else 'takes part again'}", _who(connection))
        await kept(self._journal, f"{source} is {'paused' if paused else 'resumed'}")
        return Answer({"step": self._ledger.step})

    async def _drain(self, _: Connection, __: m.NoParams) -> Answer:
        await self._control.drain()
        return Answer({"step": self._ledger.step})


def _taken_over(rank: int, by: Connection) -> RankInUse:
    return RankInUse(
        f"rank {rank} was taken over by process {by.holder.pid}: leases that were not acknowledged go to it; end one of"
        " the two trainers",
        data={"rank": rank, "pid": by.holder.pid},
    )


def _who(connection: Connection) -> str:
    """Whose doing something is, for the log."""
    return f"{connection.client or 'a client'} (pid {connection.holder.pid})"
