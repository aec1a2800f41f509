"""One connection of the consumer API: frames in, frames out.

Invariants:

* Lengths are checked before anything is allocated; a frame that is not one gets an error answer where possible, closes
  this one connection, and has touched no state.
* Requests run side by side and answer in any order; at most ``MAX_PENDING_REQUESTS`` a connection.
* Answers are written whole, one after the other; a reader that takes nothing for ``SEND_STALL_S`` is cut off.
* Group frames go to the transport as they are stored: nothing is joined or encoded again.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, NamedTuple

import anyio
from anyio.abc import TaskGroup
from structlog.typing import FilteringBoundLogger

from orchestrator.errors import BadRequest, FrameError, OrchestratorError, RequestCancelled
from orchestrator.frames import MAX_HEADER_BYTES, PREFIX_BYTES, encode_frame, parse_header, parse_prefix

from .desk import Holder

__all__ = ["READER_LIMIT_BYTES", "Answer", "Connection", "Request"]

MAX_PENDING_REQUESTS: Final = 32
"""A trainer has a few; more is a client that does not read its answers."""

SEND_STALL_S: Final = 600.0
"""A trainer that prefetches reads the next batch only when it is done with the one in hand: minutes are normal."""

READER_LIMIT_BYTES: Final = MAX_HEADER_BYTES + PREFIX_BYTES
"""What is buffered of a peer's bytes before reading from it pauses."""

MAX_MESSAGE_CHARS: Final = 4096
"""Of an error's message: it may quote a request of 1 MiB, and with its escapes be too long for a header."""

_PEERCRED = struct.Struct("3i")


class Request(NamedTuple):
    """One request as it came."""

    id: int
    method: str
    params: dict[str, Any]


class Answer(NamedTuple):
    """A result, the stored frames that are its payload, and what to do if it never leaves this process."""

    result: dict[str, Any]
    frames: Sequence[bytes | memoryview] = ()
    undo: Callable[[], None] | None = None


Handler = Callable[["Connection", Request], Awaitable[Answer]]


class Connection:
    """See the module's invariants."""

    def __init__(
        self,
        number: int,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        peer: socket.socket,
        log: FilteringBoundLogger,
    ) -> None:
        pid, uid, _ = _PEERCRED.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size))
        self.holder = Holder(number, pid)
        self.uid = uid
        self.client = ""
        self._reader = reader
        self._writer = writer
        self._sending = anyio.Lock()
        self._pending: dict[int, anyio.CancelScope] = {}
        self._log = log
        self._scope = anyio.CancelScope()
        self.tasks: TaskGroup

    def close(self) -> None:
        """End the connection; its requests are cancelled."""
        self._scope.cancel()

    def cancel(self, request_id: int) -> bool:
        """Give up a pending request; whether there was one."""
        scope = self._pending.get(request_id)
        if scope is not None:
            scope.cancel()
        return scope is not None

    async def serve(self, handler: Handler) -> None:
        """Read requests and answer them until the peer goes or the connection is closed."""
        try:
            with self._scope:
                async with anyio.create_task_group() as self.tasks:
                    await self._read_requests(handler)
                    self.tasks.cancel_scope.cancel()
        except* (ConnectionError, TimeoutError) as errors:
            self._log.debug(f"connection of process {self.holder.pid} ended: {errors.exceptions[0]}")
        finally:
            self._writer.close()

    async def _read_requests(self, handler: Handler) -> None:
        while True:
            try:
                request = await self._read_request()
            except FrameError as error:
                self._log.warning(f"process {self.holder.pid} sent a malformed frame: {error}")
                with anyio.move_on_after(1):
                    await self._send(_error_header(None, error))
                return
            if request is None:
                return
            if len(self._pending) >= MAX_PENDING_REQUESTS or request.id in self._pending:
                why = f"request id {request.id} is pending already, or more than {MAX_PENDING_REQUESTS} requests are"
                await self._send(_error_header(request.id, BadRequest(f"{why}: wait for an answer first")))
                continue
            scope = self._pending[request.id] = anyio.CancelScope()
            self.tasks.start_soon(self._answer, handler, request, scope)

    async def _read_request(self) -> Request | None:
        try:
            prefix = parse_prefix(await self._reader.readexactly(PREFIX_BYTES), max_payload=0)
            header = parse_header(await self._reader.readexactly(prefix.header_bytes))
        except asyncio.IncompleteReadError:
            return None
        request_id, method, params = header.get("id"), header.get("method"), header.get("params", {})
        if type(request_id) is not int or not isinstance(method, str) or not isinstance(params, dict):
            raise FrameError('a request is {"id": <integer>, "method": "<name>", "params": {…}}')
        return Request(request_id, method, params)

    async def _answer(self, handler: Handler, request: Request, scope: anyio.CancelScope) -> None:
        answer: Answer | None = None
        sent = False
        try:
            with scope:
                try:
                    answer = await handler(self, request)
                    head = _result_header(request.id, answer)
                except OrchestratorError as error:
                    if answer is not None and answer.undo is not None:  # it is too large to be said
                        answer.undo()
                    answer = None
                    sent = True
                    await self._send(_error_header(request.id, error))
                else:
                    async with self._sending:
                        sent = self._write(head, answer.frames)
                        await self._drain()
            if not sent and not self._scope.cancel_called:
                await self._send(_error_header(request.id, RequestCancelled(f"request {request.id} was given up")))
        finally:
            if answer is not None and answer.undo is not None and not sent:
                answer.undo()
            del self._pending[request.id]

    async def _send(self, header: dict[str, Any]) -> None:
        async with self._sending:
            self._write(encode_frame(header))
            await self._drain()

    def _write(self, head: bytes, frames: Sequence[bytes | memoryview] = ()) -> bool:
        """Give a whole frame to the transport: from here on it is on its way, whoever is cancelled."""
        self._writer.writelines([head, *frames])
        return True

    async def _drain(self) -> None:
        with anyio.fail_after(SEND_STALL_S):
            await self._writer.drain()


def _result_header(request_id: int, answer: Answer) -> bytes:
    """The head of the answer's frame.

    Raises:
        FrameError: the result is above the limit of a header.
    """
    return encode_frame({"id": request_id, "result": answer.result}, sum(map(len, answer.frames)))


def _error_header(request_id: int | None, error: OrchestratorError) -> dict[str, Any]:
    message = error.message[:MAX_MESSAGE_CHARS]
    return {"id": request_id, "error": {"code": error.code, "message": message, "data": error.data}}
