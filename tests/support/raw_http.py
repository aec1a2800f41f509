"""A server on a real socket that sends the very bytes that it is told to, piece by piece; not one of ours."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

REQUEST_BYTES = 1 << 20


@dataclass
class RawServer:
    """``then`` the last piece: ``close`` the connection, ``reset`` it, ``hang`` until the client leaves, or ``repeat``.

    With ``keeps`` the connection is listened to for further requests first, ``keeps`` of which are answered like the
    first one. ``heads`` are the requests' own, in the order in which they came; ``connections`` counts those that were
    begun, ``left`` those that have ended.
    """

    pieces: Sequence[bytes]
    then: str = "close"
    url: str = ""
    port: int = 0
    heads: list[bytes] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    keeps: int = 0
    connections: int = 0
    left: int = 0

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(self.keeps + 1):
            await self._receive(reader)
            for piece in self.pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0)
        if self.keeps:
            await self._receive(reader)
        while self.then == "repeat":
            writer.write(self.pieces[-1])
            await writer.drain()
        if self.then == "hang":
            await reader.read(1)
        if self.then == "reset":
            writer.transport.abort()

    async def _receive(self, reader: asyncio.StreamReader) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(int(x[15:]) for x in head.split(b"\r\n") if x.lower().startswith(b"content-length:"))
        self.heads.append(head)
        self.bodies.append(await reader.readexactly(length))


Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def raw_server(
    *pieces: bytes,
    then: str = "close",
    keeps: int = 0,
    host: str = "127.0.0.1",
    tls: ssl.SSLContext | None = None,
    answer: Handler | None = None,
) -> AsyncIterator[RawServer]:
    """Serve one answer, again and again, or let ``answer`` do it; every client has left when this returns."""
    served = RawServer(pieces, then, keeps=keeps)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        served.connections += 1
        try:
            writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await (answer or served.answer)(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client left, as clients do
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()
            served.left += 1

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    served.port = server.sockets[0].getsockname()[1]
    served.url = f"http{'s' if tls else ''}://{host}:{served.port}"
    try:
        yield served
    finally:
        server.close()
        await server.wait_closed()
        while served.left < served.connections:  # noqa: ASYNC110 - it comes true when the handlers have ended
            await asyncio.sleep(0.001)


def chunked(body: bytes, size: int = 1 << 30) -> bytes:
    """In chunks of this size."""
    parts = [body[i : i + size] for i in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def http_answer(
    body: bytes, how: str = "chunked", *, status: int = 200, headers: bytes = b"", size: int = 1 << 30
) -> bytes:
    """All bytes of an answer whose end is told by its chunks, by its length, or by the connection."""
    head = b"HTTP/1.1 %d X\r\nContent-Type: text/event-stream\r\n%b" % (status, headers)
    match how:
        case "chunked":
            return head + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(body, size)
        case "length":
            return head + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    return head + b"Connection: close\r\n\r\n" + body
