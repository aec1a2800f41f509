"""The client itself, written once for its blocking and its asynchronous form.

Invariants:

* A method called without a connection connects first. A broken connection is reported by ``ConnectionLost``, never
  hidden: with it the daemon has freed every lease that was not acknowledged. Only the loop over batches (``loop.py``)
  goes on by itself.
* No request is sent twice from here.
* Every wait ends: the request's own time plus a margin, then ``ConnectionLost``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from orchestrator.errors import FrameError

from .batch import Batch
from .config_calls import ConfigCalls
from .engine_calls import BATCH_TIMEOUT_S, EngineCalls
from .files import Unreadable, close_all, located, read_frames
from .loop import BatchLoop
from .waiting import Waiter
from .wire import ANSWER_MARGIN_S, Answer, BatchRequest, Wire

__all__ = ["BATCH_TIMEOUT_S", "ClientCore"]

DRAIN_TIMEOUT_S: Final = 120.0
CHECKPOINT_TIMEOUT_S: Final = 600.0


class ClientCore(EngineCalls, ConfigCalls):
    """Every method of the protocol, as coroutines; arguments as for :class:`~.connecting.Connecting`."""

    def __init__(self, waiter: Waiter, socket_path: str | Path | None, **options: Any) -> None:
        super().__init__(waiter, socket_path, **options)
        self._held: dict[str, int] = {}  # lease → step, until acknowledged or given back from here
        self._loop: BatchLoop | None = None

    # -- batches -------------------------------------------------------------------------------------------------------

    async def hello(self, *, takeover: bool = False) -> dict[str, Any]:
        """Who the daemon is and where it stands; also takes this client's rank.

        Connecting says hello already; this is for looking, and for taking over.

        Args:
            takeover: close another live connection that holds this rank.

        Returns:
            ``server, version, protocol, max_payload, run, sources, step, policy_version``.

        Raises:
            RankInUse: another live connection holds the rank; the message names its process.
        """
        wire = await self._connected(self._connect_timeout_s)
        return await self._hello_over(wire, {"rank": self.rank, "takeover": takeover})

    async def get_batch(self, timeout_s: float = BATCH_TIMEOUT_S) -> Batch:
        """This rank's share of the next batch: a batch of an earlier connection first, oldest first.

        Raises:
            BatchTimeout: none within ``timeout_s``; message and ``data["cause"]`` say why.
            RunFinished: the run has handed out its last batch.
            ShuttingDown: the daemon is draining.
            RankInUse: another live connection takes batches under this rank.
            BadWorldSize: the batch cannot be shared so.
            ConnectionLost: see the class.
            FrameError: the payload is malformed.
        """
        return await self.receive_batch(await self.request_batch(timeout_s))

    async def request_batch(self, timeout_s: float = BATCH_TIMEOUT_S) -> BatchRequest:
        """Ask for a batch without waiting for it: the first half of :meth:`get_batch`.

        The daemon forms and sends the batch meanwhile; what does not fit into the socket's buffer waits in the daemon
        until :meth:`receive_batch` reads it.
        """
        return await self._request_over(await self._connected(self._connect_timeout_s), timeout_s)

    async def _request_over(self, wire: Wire, timeout_s: float) -> BatchRequest:
        """:meth:`request_batch` over a connection that must be the one of an earlier batch."""
        return BatchRequest(await self._ask(wire, timeout_s), timeout_s, time.monotonic(), wire)

    async def _ask(self, wire: Wire, timeout_s: float) -> int:
        params: dict[str, Any] = {"timeout_s": timeout_s, "rank": self.rank, "world_size": self.world_size}
        return await wire.start("get_batch", params | {"by_file": True} if wire.reads_files else params)

    async def receive_batch(self, request: BatchRequest) -> Batch:
        """Wait for the batch of a request; raises like :meth:`get_batch`."""
        now = time.monotonic()
        deadline = max(now, request.sent_at + request.timeout_s) + ANSWER_MARGIN_S
        answer = await request.wire.answer(request.id, deadline)
        batch = _batch(await self._read(answer, request, deadline) if "frames" in answer.result else answer)
        self._held[batch.lease] = batch.step
        return batch

    async def _read(self, answer: Answer, request: BatchRequest, deadline: float) -> Answer:
        """The answer with the frames that it says where to read; where that cannot be, as the socket brings it."""
        wire = request.wire
        try:
            frames = located(answer.result["frames"], answer.descriptors, wire.max_payload)
            return Answer(answer.result, await read_frames(frames, self._pool, lambda: self._waiter.sleep(0)))
        except Unreadable:
            wire.reads_files = False
            wire.give_back(answer.result)
            return await wire.answer(await self._ask(wire, request.timeout_s), deadline)
        except BaseException:
            wire.give_back(answer.result)
            raise
        finally:
            close_all(answer.descriptors)

    async def cancel(self, request: BatchRequest) -> None:
        """Give a request up; a batch that comes nevertheless is given back and handed out again."""
        request.wire.give_up(request.id)

    async def ack(self, lease: str) -> None:
        """The batch is trained on and never comes again. Twice is fine.

        Raises:
            LeaseUnknown: the lease was never handed out, or was ended by ``load`` or another world size.
        """
        await self._call("ack", {"lease": lease})
        self._held.pop(lease, None)

    async def nack(self, lease: str, *, discard: bool = False) -> None:
        """Give a batch back: it is handed out again, or with ``discard`` dropped and counted.

        Raises:
            LeaseUnknown: as for :meth:`ack`.
        """
        await self._call("nack", {"lease": lease, "discard": discard})
        self._held.pop(lease, None)

    def _holds(self, lease: str) -> bool:
        """Whether this client received the lease and neither acknowledged it nor gave it back."""
        return lease in self._held

    async def _new_loop(
        self,
        *,
        timeout_s: float | None,
        prefetch: bool,
        reconnect_s: float,
        on_wait: Callable[[dict[str, Any]], None] | None,
    ) -> BatchLoop:
        """A loop over batches; what an earlier, unfinished loop of this client still holds is given back first."""
        earlier, self._loop = self._loop, None
        if earlier is not None:
            await earlier.give_back()
        self._loop = BatchLoop(
            self, timeout_s=timeout_s, prefetch=prefetch, reconnect_s=reconnect_s, on_wait=on_wait or _ignore
        )
        return self._loop

    # -- the run -------------------------------------------------------------------------------------------------------

    async def status(self, *, history: int = 0) -> dict[str, Any]:
        """Everything that ``orchestrator status --json`` prints, with the figures of that many of the last steps."""
        return await self._call("status", {"history": history} if history else {})

    async def set_weight(self, source: str, weight: float | str | None) -> dict[str, Any]:
        """Set a source's weight: a number, a ``"lambda step: …"`` text, a dotted path, ``None`` for back to the file.

        Returns:
            ``step``: of the first batch that it applies to.

        Raises:
            SourceUnknown: no source of that name.
            WeightError, ExpressionError, DottedPathError: the weight cannot be used.
        """
        return await self._call("set_weight", {"source": source, "weight": weight})

    async def pause(self, source: str) -> None:
        """Keep a source out of new batches.

        Raises:
            SourceUnknown: no source of that name.
        """
        await self._call("pause", {"source": source})

    async def resume(self, source: str) -> None:
        """Let a paused source take part again; raises like :meth:`pause`."""
        await self._call("resume", {"source": source})

    async def drain(self) -> None:
        """Stop launching, finish or park what is in flight, snapshot."""
        await self._call("drain", {}, DRAIN_TIMEOUT_S)

    async def save(self, name: str, trained_through: int | None = None) -> dict[str, Any]:
        """Save a named checkpoint beside the trainer's own.

        Args:
            name: usually the trainer's step.
            trained_through: batches up to this step count as acknowledged; default: the oldest batch that this client
                holds, the one that is being trained on.

        Returns:
            ``step``.

        Raises:
            BadRequest: it cannot be a checkpoint's name.
            StateError: the disk failed.
        """
        if trained_through is None:
            trained_through = min(self._held.values(), default=None)
        through: Mapping[str, int] = {} if trained_through is None else {"trained_through": trained_through}
        return await self._call("save", {"name": name, **through}, CHECKPOINT_TIMEOUT_S)

    async def load(self, name: str) -> dict[str, Any]:
        """Go back to a named checkpoint: all leases end; generation rests until a policy version is set.

        Returns:
            ``step``.

        Raises:
            CheckpointError: there is none of that name, it is damaged, or of another state.
            ForeignState: it is of other sources.
        """
        result = await self._call("load", {"name": name}, CHECKPOINT_TIMEOUT_S)
        self._held.clear()
        return result

    async def checkpoints(self) -> list[dict[str, Any]]:
        """All checkpoints, the oldest first: ``name``, ``step``, ``policy_version``, ``groups``, and more of each."""
        return list((await self._call("checkpoints", {}, CHECKPOINT_TIMEOUT_S))["checkpoints"])

    async def verify_checkpoints(self, name: str | None = None) -> dict[str, list[str]]:
        """Check every checksum of one checkpoint, or of all; returns what is wrong, by name.

        Raises:
            CheckpointError: there is none of that name.
        """
        params = {} if name is None else {"name": name}
        return dict((await self._call("verify_checkpoints", params, CHECKPOINT_TIMEOUT_S))["problems"])


def _batch(answer: Answer) -> Batch:
    try:
        return Batch.from_answer(answer.result, answer.payload)
    except FrameError as error:
        raise FrameError(f"a malformed batch: {error}") from error


def _ignore(cause: dict[str, Any]) -> None:
    """Default of ``on_wait``."""
