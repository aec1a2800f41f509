"""A consumer server in this process whose methods are a few lines of the test, and plain sockets to talk to it."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import structlog
from anyio.abc import SocketStream

from orchestrator.consumer import ConsumerServer
from orchestrator.consumer.socket.connection import Answer, Connection
from orchestrator.consumer.socket.requests import Request
from orchestrator.errors import BadRequest
from orchestrator.frames import PREFIX_BYTES, encode_frame, parse_header, parse_prefix

Handler = Callable[[Connection, Request], Awaitable[Answer]]


class Methods:
    """The service of a server: ``echo``, ``hold`` (its connection is in use from then on), ``cancel``, and more."""

    def __init__(self, **methods: Handler) -> None:
        self.methods: dict[str, Handler] = {"echo": echo, "hold": self._hold, "cancel": cancel, **methods}
        self.connections: dict[int, Connection] = {}
        self.holders: set[Connection] = set()
        self.at_work: set[Connection] = set()

    async def _hold(self, connection: Connection, _: Request) -> Answer:
        self.holders.add(connection)
        return Answer({})

    async def handle(self, connection: Connection, request: Request) -> Answer:
        if request.method not in self.methods:
            raise BadRequest("no such method")
        return await self.methods[request.method](connection, request)

    def opened(self, connection: Connection) -> None:
        self.connections[connection.holder.connection] = connection

    def closed(self, connection: Connection) -> None:
        del self.connections[connection.holder.connection]

    def holds_nothing(self, connection: Connection) -> bool:
        return not connection.is_waiting and connection not in self.holders

    def is_at_work(self, connection: Connection) -> bool:
        return connection in self.at_work


async def echo(_: Connection, request: Request) -> Answer:
    return Answer(request.params)


async def cancel(connection: Connection, request: Request) -> Answer:
    return Answer({"cancelled": connection.cancel(request.params["id"])})


async def for_ever(_: Connection, __: Request) -> Answer:
    await anyio.sleep_forever()
    raise AssertionError("not reached")


@asynccontextmanager
async def serving(folder: Path, service: Methods, *, limit: int = 100, **options: Any) -> AsyncIterator[Path]:
    path = folder / "sock"
    server = ConsumerServer(path, service, max_connections=limit, log=structlog.get_logger(), **options)
    async with anyio.create_task_group() as tasks:
        await tasks.start(server.run)
        with anyio.fail_after(30):
            yield path
        tasks.cancel_scope.cancel()


class Line:
    """One end of a connection; ``pause_s`` after each time that it reads."""

    def __init__(self, stream: SocketStream, pause_s: float = 0.0) -> None:
        self.stream = stream
        self._pause_s = pause_s
        self._data = bytearray()

    @property
    def socket(self) -> socket.socket:
        return self.stream.extra_attributes[anyio.abc.SocketAttribute.raw_socket]()  # type: ignore[no-any-return]

    async def ask(self, method: str, request_id: int = 1, **params: Any) -> Any:
        """The result, or the code of the error."""
        await self.send(method, request_id, **params)
        return await self.answer()

    async def send(self, method: str, request_id: int = 1, **params: Any) -> None:
        await self.stream.send(encode_frame({"id": request_id, "method": method, "params": params}))

    async def answer(self) -> Any:
        header = await self.header()
        return header["error"]["code"] if "error" in header else header["result"]

    async def header(self) -> dict[str, Any]:
        await self._have(PREFIX_BYTES)
        prefix = parse_prefix(self._data)
        await self._have(prefix.frame_bytes)
        header = parse_header(bytes(self._data[PREFIX_BYTES : PREFIX_BYTES + prefix.header_bytes]))
        del self._data[: prefix.frame_bytes]
        return header

    async def rest(self) -> bytes:
        """What comes until the other side ends the connection."""
        data, self._data = self._data, bytearray()
        while True:
            try:
                data += await self.stream.receive()
            except (anyio.EndOfStream, anyio.BrokenResourceError):
                return bytes(data)

    async def _have(self, size: int) -> None:
        while len(self._data) < size:
            self._data += await self.stream.receive()
            if self._pause_s:
                await anyio.sleep(self._pause_s)


async def until(condition: Callable[[], Any]) -> None:
    while not condition():  # noqa: ASYNC110 - what is waited for tells nobody
        await anyio.sleep(0.005)


@asynccontextmanager
async def dial(path: Path) -> AsyncIterator[Line]:
    async with await anyio.connect_unix(path) as stream:
        yield Line(stream)
