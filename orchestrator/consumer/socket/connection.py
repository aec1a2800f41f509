"""One connection of the consumer API: frames in, frames out.

Invariants:

* Lengths are checked before anything is allocated; a frame that is not one gets an error answer where possible, closes
  this one connection, and has touched no state.
* A frame that has begun is finished within ``FRAME_DEADLINE_S``; between frames a client may be silent for ever.
* Requests run side by side and answer in any order; at most ``MAX_PENDING_REQUESTS`` a connection. Every request is
  answered once: by its result, its error, ``cancelled``, or ``internal`` where this program is at fault.
* Once an answer is decided it is on its way, and nobody cancels it any more.
* However a connection ends, its socket is closed within ``LINGER_S``.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, Protocol

import anyio
from anyio.abc import TaskGroup

from orchestrator.consumer.handout import Holder
from orchestrator.core.ledger.groups import LocatedFrames
from orchestrator.errors import BadRequest, FrameError, OrchestratorError, RequestCancelled, StateError
from orchestrator.frames import PREFIX_BYTES, encode_frame, parse_prefix

from .requests import Request, parse_request
from .send_queue import SendQueue
from .sparse_log import SparseLog

__all__ = ["READER_LIMIT_BYTES", "Answer", "Connection", "Requests", "error_frame"]

FRAME_DEADLINE_S: Final = 10.0
"""From the first byte of a frame to its last: a whole header of 1 MiB takes milliseconds."""

MAX_PENDING_REQUESTS: Final = 32
"""A trainer has a few; more is a client that does not read its answers."""

READER_LIMIT_BYTES: Final = 64 << 10
"""Twice this is buffered of a peer's bytes before reading from it pauses, unless one header is longer."""

LINGER_S: Final = 1.0
"""For what is still to be sent when a connection ends, such as the error that says why."""

MAX_MESSAGE_CHARS: Final = 4096
"""Of an error's message: it may quote a request of 1 MiB, and with its escapes be too long for a header."""


class Answer(NamedTuple):
    """A result; of a batch also its lease, its stored frames, and what to do if it cannot be said.

    ``located``: the client would rather read the frames where they lie.
    """

    result: dict[str, Any]
    frames: Sequence[bytes | memoryview] = ()
    lease: str | None = None
    undo: Callable[[], None] | None = None
    located: LocatedFrames | None = None


class Requests(Protocol):
    """What a connection's requests are answered by."""

    async def handle(self, connection: Connection, request: Request) -> Answer:
        """Do what a request asks; raises ``OrchestratorError`` for what is to be answered with an error."""
        ...

    def is_at_work(self, connection: Connection) -> bool:
        """Whether the client has a batch in hand that was sent to it whole."""
        ...


class _Reply(NamedTuple):
    """A decided answer: the frame in parts, and the lease that comes with it.

    ``short``: a frame that says where the stored frames are, to be sent with the descriptors if that can be done.
    """

    head: bytes
    frames: Sequence[bytes | memoryview] = ()
    lease: str | None = None
    short: bytes = b""
    descriptors: Sequence[int] = ()


class Connection:
    """See the module's invariants.

    Args:
        holder: its number and the process at its other end.
        sock: what both of the following use, and close.
        reader: what comes; its limit is :data:`READER_LIMIT_BYTES`.
        writer: what goes.
        requests: answers them.
        long_headers: bounds how many headers longer than the reader's limit are received at a time.
        log: for what went wrong.
    """

    def __init__(
        self,
        holder: Holder,
        sock: socket.socket,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        requests: Requests,
        long_headers: anyio.CapacityLimiter,
        log: SparseLog,
    ) -> None:
        self.holder = holder
        self.client = ""
        self.delivered: set[str] = set()
        """Leases whose batches were sent over this connection, whole."""
        self.last_request_at: float | None = None
        """On the loop's clock; ``None`` before the first request."""
        self._reader = reader
        self._writer = writer
        self._requests = requests
        self._long_headers = long_headers
        self._log = log
        self._send_queue = SendQueue(sock, writer, lambda: requests.is_at_work(self))
        self._pending: dict[int, anyio.CancelScope | None] = {}  # None: the answer is decided
        self._scope = anyio.CancelScope()
        self.tasks: TaskGroup

    @property
    def is_waiting(self) -> bool:
        """Whether a request is not answered yet."""
        return bool(self._pending)

    def close(self, why: OrchestratorError | None = None) -> None:
        """End the connection; its requests are cancelled, and ``why`` is the last that it is told."""
        if why is not None:
            self._send_queue.send_last(error_frame(None, why))
        self._scope.cancel()

    def cancel(self, request_id: int) -> bool:
        """Give up a pending request; whether there was one."""
        scope = self._pending.get(request_id)
        if scope is not None:
            scope.cancel()
        return scope is not None

    # -- serving -------------------------------------------------------------------------------------------------------

    async def serve(self) -> None:
        """Read requests and answer them until the peer goes or the connection is closed."""
        try:
            with self._scope:
                async with anyio.create_task_group() as self.tasks:
                    await self._read_requests()
                    self.tasks.cancel_scope.cancel()
        except* ConnectionError as errors:
            self._log.debug(f"connection of process {self.holder.pid} ended: {errors.exceptions[0]}")
        except* TimeoutError as errors:
            self._log.warning("stalled", f"process {self.holder.pid} was disconnected: {errors.exceptions[0]}")
            self._writer.transport.abort()

    async def hang_up(self) -> None:
        """Close the socket, with what is on its way if the client takes it now."""
        self._writer.close()
        with anyio.move_on_after(LINGER_S, shield=True), contextlib.suppress(OSError):  # it may be broken already
            await self._writer.wait_closed()
        self._writer.transport.abort()

    async def _read_requests(self) -> None:
        while True:
            try:
                request = await self._read_request()
            except FrameError as error:
                self._log.warning("malformed", f"process {self.holder.pid} sent a malformed frame: {error}")
                with anyio.move_on_after(LINGER_S):
                    await self._send_queue.send(error_frame(None, error))
                return
            if request is None or self._scope.cancel_called:  # what came before the end is not begun any more
                return
            self.last_request_at = anyio.current_time()
            if len(self._pending) >= MAX_PENDING_REQUESTS or request.id in self._pending:
                why = f"request id {request.id} is already pending, or more than {MAX_PENDING_REQUESTS} requests are"
                await self._send_queue.send(error_frame(request.id, BadRequest(f"{why}: wait for an answer first")))
                continue
            scope = self._pending[request.id] = anyio.CancelScope()
            self.tasks.start_soon(self._answer, request, scope)

    async def _read_request(self) -> Request | None:
        """The next request; ``None`` at the end of the stream.

        Raises:
            FrameError: what came is not a request, or not all of it came in time.
        """
        try:
            first = await self._reader.readexactly(1)
            with anyio.move_on_after(FRAME_DEADLINE_S):
                return await self._read_frame(first)
        except asyncio.IncompleteReadError:
            return None
        raise FrameError(f"a frame was not completed within {FRAME_DEADLINE_S:g} s")

    async def _read_frame(self, first: bytes) -> Request:
        rest = await self._reader.readexactly(PREFIX_BYTES - len(first))
        size = parse_prefix(first + rest, max_payload=0).header_bytes
        if size <= READER_LIMIT_BYTES:
            return parse_request(await self._reader.readexactly(size))
        async with self._long_headers:
            return parse_request(await self._reader.readexactly(size))

    # -- answering -----------------------------------------------------------------------------------------------------

    async def _answer(self, request: Request, scope: anyio.CancelScope) -> None:
        reply = None
        try:
            with scope:
                reply = await self._reply(request)
            self._pending[request.id] = None
            if reply is None:
                reply = _Reply(error_frame(request.id, RequestCancelled(f"request {request.id} was cancelled")))
            await self._send(reply)
            if reply.lease is not None:
                self.delivered.add(reply.lease)
        finally:
            del self._pending[request.id]

    async def _send(self, reply: _Reply) -> None:
        try:
            if reply.descriptors and await self._send_queue.send_descriptors(reply.short, reply.descriptors):
                return
        finally:
            _close(reply.descriptors)
        await self._send_queue.send(reply.head, reply.frames)

    async def _reply(self, request: Request) -> _Reply:
        """What is to be sent; a fault of this program is answered and logged, and ends no other request."""
        try:
            return self._encoded(request.id, await self._requests.handle(self, request))
        except OrchestratorError as error:
            return _Reply(error_frame(request.id, error))
        except OSError as error:
            return _Reply(error_frame(request.id, StateError(f"{request.method[:80]}: {error}; see the daemon's log")))
        except Exception as error:  # noqa: BLE001 - one request's defect must not end a run of days; it is logged
            self._log.exception(f"the request {request.method[:80]!r} of process {self.holder.pid} failed")
            what = f"{request.method[:80]} failed because of a bug in the daemon ({type(error).__name__})"
            return _Reply(error_frame(request.id, OrchestratorError(f"{what}; see its log")))

    def _encoded(self, request_id: int, answer: Answer) -> _Reply:
        """The answer as a frame.

        Raises:
            FrameError: the result is above the limit of a header; the answer is undone.
        """
        try:
            head = encode_frame({"id": request_id, "result": answer.result}, sum(map(len, answer.frames)))
        except FrameError:
            if answer.located is not None:
                _close(answer.located.descriptors)
            if answer.undo is not None:
                answer.undo()
            raise
        reply = _Reply(head, answer.frames, answer.lease)
        if answer.located is None:
            return reply
        try:
            short = encode_frame({"id": request_id, "result": answer.result | {"frames": answer.located.table}})
        except FrameError:  # of tens of thousands of groups: the list of them is above the limit of a header
            _close(answer.located.descriptors)
            return reply
        return reply._replace(short=short, descriptors=answer.located.descriptors)


def _close(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def error_frame(request_id: int | None, error: OrchestratorError) -> bytes:
    """The frame that answers a request with an error; without an id it is of the connection as a whole."""
    message = error.message[:MAX_MESSAGE_CHARS].encode("utf-8", "replace").decode()  # a path may be no UTF-8
    said = {"code": error.code, "message": message, "data": error.data}
    try:
        return encode_frame({"id": request_id, "error": said})
    except FrameError:  # its data is above the limit of a header
        return encode_frame({"id": request_id, "error": said | {"data": {}}})
