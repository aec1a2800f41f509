"""The loop of a trainer over its batches.

Invariants:

* A batch is acknowledged when the next one is asked for, and so is the last one before the end. A batch whose loop body
  raised, or was left by ``break``, is not: it is handed out again.
* Acknowledge first, then ask: after a broken connection the daemon would otherwise hand out the batch in hand again.
  For the same reason the next batch is asked for early only on the connection that the batch in hand came over.
* A broken connection, a draining daemon, one without room, and a disk that does not keep an acknowledgement are waited
  for, up to ``reconnect_s`` each time; an acknowledgement whose answer was lost is sent again, which is harmless.
* No wait is silent: every one of ``WAIT_SLICE_S`` is reported with its cause.
"""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol, TypeVar

from orchestrator.errors import (
    BatchTimeout,
    ConnectionLost,
    NotWritten,
    OrchestratorError,
    RankInUse,
    RunFinished,
    ShuttingDown,
    TooManyConnections,
)

from .batch import Batch
from .waiting import Waiter
from .wire import BatchRequest, Wire

__all__ = ["BatchLoop", "LoopClient"]

T = TypeVar("T")

WAIT_SLICE_S: Final = 30.0
"""How long the daemon is asked to wait at a time: twice a minute one hears why there is no batch."""

RETRY_S: Final = 0.25
"""Between attempts at a daemon that is reached but drains, or has not noticed yet that the old connection ended."""


class LoopClient(Protocol):
    """What the loop asks of its client; names with an underscore are for the loop alone, and not for a trainer."""

    @property
    def _waiter(self) -> Waiter:
        """How to wait."""
        ...

    def _holds(self, lease: str) -> bool:
        """Whether this client received the lease and neither acknowledged it nor gave it back."""
        ...

    async def _request_over(self, wire: Wire, timeout_s: float) -> BatchRequest:
        """Ask for a batch over a connection that must be the one of an earlier batch."""
        ...

    async def connect(self, timeout_s: float | None = None) -> None:
        """Connect, unless connected."""
        ...

    async def request_batch(self, timeout_s: float) -> BatchRequest:
        """Ask for a batch without waiting for it."""
        ...

    async def receive_batch(self, request: BatchRequest) -> Batch:
        """Wait for the batch of a request."""
        ...

    async def ack(self, lease: str) -> None:
        """The batch is trained on."""
        ...

    async def nack(self, lease: str) -> None:
        """Give the batch back."""
        ...


class BatchLoop:
    """See the module's invariants.

    Args:
        client: whose batches.
        timeout_s: longest wait for one batch; ``None``: for ever.
        prefetch: ask for the next batch before the trainer works on this one.
        reconnect_s: longest wait for a broken connection to work again.
        on_wait: called with the cause of each wait.
    """

    def __init__(
        self,
        client: LoopClient,
        *,
        timeout_s: float | None,
        prefetch: bool,
        reconnect_s: float,
        on_wait: Callable[[dict[str, Any]], None],
    ) -> None:
        self._client = client
        self._timeout_s = math.inf if timeout_s is None else timeout_s
        self._prefetch = prefetch
        self._reconnect_s = reconnect_s
        self._on_wait = on_wait
        self._ahead: BatchRequest | None = None
        self._in_hand: tuple[str, BatchRequest] | None = None  # lease, and what it came by
        self._give_up_at: float | None = None  # set from a failure to the next batch

    async def next(self) -> Batch | None:
        """Acknowledge the batch in hand and wait for the next; ``None`` after the last.

        Raises:
            BatchTimeout: none within ``timeout_s``.
            ConnectionLost, NotWritten, ShuttingDown, RankInUse, TooManyConnections: nor did it get better within
                ``reconnect_s``.
            OrchestratorError: other answers of the daemon.
        """
        if self._in_hand is not None:
            lease = self._in_hand[0]
            if self._client._holds(lease):
                await self._persist(lambda: self._client.ack(lease))
            self._in_hand = None
        deadline = time.monotonic() + self._timeout_s
        try:
            batch, request = await self._persist(lambda: self._take(deadline))
        except RunFinished:
            return None
        self._give_up_at = None
        self._in_hand = (batch.lease, request)
        if self._prefetch:
            self._ahead = await self._ask_ahead(request)
        return batch

    async def give_back(self) -> None:
        """Free what this loop still holds; a closed connection has done so already."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.wire.give_up(ahead.id)
        in_hand, self._in_hand = self._in_hand, None
        if in_hand is not None and in_hand[1].wire.is_open and self._client._holds(in_hand[0]):
            await self._client.nack(in_hand[0])

    async def _ask_ahead(self, request: BatchRequest) -> BatchRequest | None:
        try:
            return await self._client._request_over(request.wire, min(WAIT_SLICE_S, self._timeout_s))
        except ConnectionLost:
            return None  # the batch in hand is whole; the next call finds out and connects again

    async def _take(self, deadline: float) -> tuple[Batch, BatchRequest]:
        """The batch that was asked for early, or one that is asked for now, waiting in slices."""
        request, self._ahead = self._ahead, None
        if request is not None and request.wire.is_open:
            try:
                return await self._client.receive_batch(request), request
            except BatchTimeout:
                pass  # that wait passed while the trainer worked: nobody was kept waiting
        while True:
            left = max(0.0, deadline - time.monotonic())
            request = await self._client.request_batch(min(WAIT_SLICE_S, left))
            try:
                return await self._client.receive_batch(request), request
            except BatchTimeout as error:
                cause = error.data.get("cause")
                self._on_wait(cause if isinstance(cause, dict) else {"sentence": error.message})
                if time.monotonic() >= deadline:
                    raise

    async def _persist(self, operation: Callable[[], Awaitable[T]]) -> T:
        """The operation's value, across broken connections and a daemon that is being replaced."""
        while True:
            began = time.monotonic()
            try:
                return await operation()
            except (ConnectionLost, NotWritten, RankInUse, ShuttingDown, TooManyConnections) as error:
                if self._give_up_at is None and isinstance(error, RankInUse):
                    raise  # somebody else's; after a broken connection it may be our own, which the daemon still sees
                now = time.monotonic()
                if self._give_up_at is None or now - began > self._reconnect_s:  # it worked for long in between
                    self._give_up_at = now + self._reconnect_s
                if now >= self._give_up_at:
                    raise
                await self._recover(error, self._give_up_at - now)

    async def _recover(self, error: OrchestratorError, left: float) -> None:
        self._on_wait({"kind": "connection", "sentence": error.message, "sources": []})
        if isinstance(error, ConnectionLost):
            await self._client.connect(left)
        else:
            await self._client._waiter.sleep(min(RETRY_S, left))
