"""The client for a trainer without an event loop: :class:`~.core.ClientCore`, blocking.

Invariants:

* Every method is that of ``ClientCore``, run to its end in the calling thread; nothing is decided here.
* Standard library and numpy only (orjson where it is installed); no event loop is started, no thread either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from .batch import Batch
from .core import BATCH_TIMEOUT_S, ClientCore
from .engine_calls import UPDATE_TIMEOUT_S
from .waiting import BlockingWaiter, run_now
from .wire import BatchRequest

__all__ = ["RolloutClient"]


class RolloutClient:
    """Takes batches from a daemon; blocking.

    One client belongs to one thread (open one per thread). It connects when first used, and after ``ConnectionLost``
    the next call connects again; leases that were not acknowledged are then handed out again.

    Args:
        socket_path: the daemon's Unix socket; default ``$ORCHESTRATOR_SOCKET``, then ``run/orchestrator.sock``.
        rank: which share of each batch to take, from 0.
        world_size: how many ranks take shares.
        client: a name for the daemon's log.
        takeover: on the first connection, close another live connection that holds this rank.
        connect_timeout_s: how long to wait for a daemon that does not listen yet.

    Example::

        with RolloutClient() as client:
            for batch in client.batches(prefetch=True):
                update(batch.to_torch(), batch.advantages())
                client.set_policy_version(batch.step + 1)
    """

    def __init__(
        self,
        socket_path: str | Path | None = None,
        *,
        rank: int = 0,
        world_size: int = 1,
        client: str = "trainer",
        takeover: bool = False,
        connect_timeout_s: float = 10.0,
    ) -> None:
        self._core = ClientCore(
            BlockingWaiter(),
            socket_path,
            rank=rank,
            world_size=world_size,
            client=client,
            takeover=takeover,
            connect_timeout_s=connect_timeout_s,
        )

    def __enter__(self) -> Self:
        self.connect()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def batches(
        self,
        *,
        timeout_s: float | None = None,
        prefetch: bool = False,
        reconnect_s: float = 60.0,
        on_wait: Callable[[dict[str, Any]], None] | None = None,
    ) -> Iterator[Batch]:
        """Batches until the run is finished, each acknowledged when the next is asked for, and the last at the end.

        A batch whose loop body raised is not acknowledged. Neither is the last one of a loop that is left by ``break``
        or cut off by ``zip`` or ``islice``: call ``ack(batch.lease)`` if it is trained on. What a loop leaves behind is
        handed out again when the connection closes, or when this client begins another loop.

        Args:
            timeout_s: raise ``BatchTimeout`` if one batch takes longer; ``None`` waits on.
            prefetch: ask for the next batch before this one is yielded, so that the daemon forms it and begins to send
                while the trainer works. Nothing is read meanwhile (there is no thread): what remains when the trainer
                comes back is the transfer, and a batch that was formed one step of training earlier.
            reconnect_s: how long a broken connection, or a daemon that is being replaced, is waited for.
            on_wait: called about every 30 s of waiting with the cause: ``sentence`` says it in words, ``kind`` and
                ``sources`` in parts; also when the connection broke.

        Raises:
            BatchTimeout: see ``timeout_s``.
            ConnectionLost, ShuttingDown, RankInUse: it did not get better within ``reconnect_s``.
        """
        loop = run_now(
            self._core._new_loop(timeout_s=timeout_s, prefetch=prefetch, reconnect_s=reconnect_s, on_wait=on_wait)
        )
        while (batch := run_now(loop.next())) is not None:
            yield batch
            del batch  # the memory is free for the next batch as soon as the trainer lets go of this one

    # What follows is documented in full at the methods of the same names of `ClientCore`.

    def connect(self, timeout_s: float | None = None) -> None:
        """Connect and say hello, unless connected; tries again until ``timeout_s`` is over."""
        run_now(self._core.connect(timeout_s))

    def close(self) -> None:
        """Close the connection; batches that were not acknowledged are handed out again."""
        self._core.close()

    def hello(self, *, takeover: bool = False) -> dict[str, Any]:
        """Who the daemon is and where it stands; also takes this client's rank."""
        return run_now(self._core.hello(takeover=takeover))

    def get_batch(self, timeout_s: float = BATCH_TIMEOUT_S) -> Batch:
        """This rank's share of the next batch: a batch of an earlier connection first, oldest first."""
        return run_now(self._core.get_batch(timeout_s))

    def request_batch(self, timeout_s: float = BATCH_TIMEOUT_S) -> BatchRequest:
        """Ask for a batch without waiting for it: the first half of :meth:`get_batch`."""
        return run_now(self._core.request_batch(timeout_s))

    def receive_batch(self, request: BatchRequest) -> Batch:
        """Wait for the batch of a request; raises like :meth:`get_batch`."""
        return run_now(self._core.receive_batch(request))

    def cancel(self, request: BatchRequest) -> None:
        """Give a request up; a batch that comes nevertheless is given back and handed out again."""
        run_now(self._core.cancel(request))

    def ack(self, lease: str) -> None:
        """The batch is trained on and never comes again. Twice is fine."""
        run_now(self._core.ack(lease))

    def nack(self, lease: str, *, discard: bool = False) -> None:
        """Give a batch back: it is handed out again, or with ``discard`` dropped and counted."""
        run_now(self._core.nack(lease, discard=discard))

    def set_policy_version(self, version: int, mode: Literal["keep", "abort"] = "keep") -> dict[str, Any]:
        """From now on new tokens carry this version; ``abort`` interrupts what is in flight into partial rollouts."""
        return run_now(self._core.set_policy_version(version, mode))

    def pause_generation(
        self, mode: Literal["abort", "finish"] = "abort", timeout_s: float = BATCH_TIMEOUT_S
    ) -> dict[str, Any]:
        """Return when the engines are quiet; they stay so until :meth:`continue_generation`."""
        return run_now(self._core.pause_generation(mode, timeout_s))

    def continue_generation(self) -> dict[str, Any]:
        """End the pause; returns ``in_flight``."""
        return run_now(self._core.continue_generation())

    def update_weights(
        self,
        path: str | Path,
        version: int,
        mode: Literal["abort", "finish", "keep"] = "abort",
        *,
        rolling: bool = False,
        timeout_s: float = UPDATE_TIMEOUT_S,
    ) -> dict[str, Any]:
        """Have every engine load the parameters at ``path``; returns how it went at each."""
        return run_now(self._core.update_weights(path, version, mode, rolling=rolling, timeout_s=timeout_s))

    def engines(self) -> list[dict[str, Any]]:
        """Every engine as it is now."""
        return run_now(self._core.engines())

    def add_engine(self, engine: Mapping[str, Any]) -> str:
        """One more engine, as a config file says it; returns its name."""
        return run_now(self._core.add_engine(engine))

    def drain_engine(self, name: str) -> int:
        """Send an engine no new requests; returns how many it still has."""
        return run_now(self._core.drain_engine(name))

    def resume_engine(self, name: str) -> None:
        """Send a drained engine requests again."""
        run_now(self._core.resume_engine(name))

    def remove_engine(self, name: str) -> int:
        """Let an engine go; its requests go on elsewhere. Returns how many."""
        return run_now(self._core.remove_engine(name))

    def status(self, *, history: int = 0) -> dict[str, Any]:
        """Everything that ``orchestrator status --json`` prints; ``history`` of the last steps have their figures."""
        return run_now(self._core.status(history=history))

    def set_weight(self, source: str, weight: float | str | None) -> dict[str, Any]:
        """Set a source's weight: a number, a ``"lambda step: …"`` text, a dotted path; ``None``: back to the file."""
        return run_now(self._core.set_weight(source, weight))

    def pause(self, source: str) -> None:
        """Keep a source out of new batches."""
        run_now(self._core.pause(source))

    def resume(self, source: str) -> None:
        """Let a paused source take part again; raises like :meth:`pause`."""
        run_now(self._core.resume(source))

    # -- the config ----------------------------------------------------------------------------------------------------

    def reload(self) -> dict[str, Any]:
        """Have the daemon read its config file again; see :meth:`AsyncRolloutClient.reload`."""
        return run_now(self._core.reload())

    def sources(self) -> list[dict[str, Any]]:
        """Every source with its weight and cap; see :meth:`AsyncRolloutClient.sources`."""
        return run_now(self._core.sources())

    def add_source(self, source: Mapping[str, Any], weight: float | str, cap: float | str | None = None) -> None:
        """One more source; see :meth:`AsyncRolloutClient.add_source`."""
        run_now(self._core.add_source(source, weight, cap))

    def remove_source(self, name: str) -> None:
        """Let a source go; see :meth:`AsyncRolloutClient.remove_source`."""
        run_now(self._core.remove_source(name))

    def restore_source(self, name: str) -> None:
        """Have a removed source again; see :meth:`AsyncRolloutClient.restore_source`."""
        run_now(self._core.restore_source(name))

    def drain(self) -> None:
        """Stop launching, finish or park what is in flight, snapshot."""
        run_now(self._core.drain())

    def save(self, name: str, trained_through: int | None = None) -> dict[str, Any]:
        """Save a named checkpoint beside the trainer's own."""
        return run_now(self._core.save(name, trained_through))

    def load(self, name: str) -> dict[str, Any]:
        """Go back to a named checkpoint: all leases end; generation rests until a policy version is set."""
        return run_now(self._core.load(name))

    def checkpoints(self) -> list[dict[str, Any]]:
        """All checkpoints, the oldest first."""
        return run_now(self._core.checkpoints())

    def verify_checkpoints(self, name: str | None = None) -> dict[str, list[str]]:
        """Check every checksum of one checkpoint, or of all; returns what is wrong, by name."""
        return run_now(self._core.verify_checkpoints(name))
