"""An HTTP server on a real socket that answers as it is told, mostly wrongly; not one of ours.

Each path has a row of replies; the last one is repeated. ``requests`` holds what was asked: ``(path, body)``.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import anyio
from anyio.abc import SocketAttribute, SocketStream

MAX_REQUEST_BYTES = 8 << 20


@dataclass(frozen=True)
class Reply:
    """``length`` is the one that is declared; ``None``: none, the body ends with the connection.

    ``then``: after the body the connection is closed, reset, or held open in silence; or the last part of the body is
    sent for ever, until the client has enough.
    """

    body: bytes = b""
    status: int = 200
    length: int | None = None
    then: Literal["close", "reset", "hang", "repeat"] = "close"


SILENCE = Reply(b"", then="hang", status=0)
"""Accepts and never answers."""


def answer(value: Any, status: int = 200) -> Reply:
    """A proper JSON answer."""
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    return Reply(body, status=status, length=len(body))


def event(value: Any) -> bytes:
    return b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n"


def token_event(token: int, nth: int, **fields: Any) -> dict[str, Any]:
    """What a llama.cpp server streams for its ``nth`` token."""
    return {
        "content": chr(token),
        "tokens": [token],
        "tokens_predicted": nth,
        "completion_probabilities": [{"id": token, "logprob": -0.5, "top_logprobs": []}],
        "stop": False,
    } | fields


def end_event(nth: int, stop_type: str = "eos") -> dict[str, Any]:
    return {"content": "", "tokens": [], "tokens_predicted": nth, "stop": True, "stop_type": stop_type}


def stream(events: Iterable[Any], **how: Any) -> Reply:
    return Reply(b"".join(map(event, events)), **how)


WELL = {
    "/health": (answer({"status": "ok"}),),
    "/props": (answer({"default_generation_settings": {"n_ctx": 512}, "model_path": "fault.gguf"}),),
    "/tokenize": (answer({"tokens": [1, 2, 3]}),),
    "/detokenize": (answer({"content": "text"}),),
}


@dataclass
class FaultServer:
    """See the module's docstring; ``url`` is set while it serves."""

    replies: dict[str, Sequence[Reply]]
    url: str = ""
    requests: list[tuple[str, Any]] = field(default_factory=list)
    open_connections: int = 0
    left: anyio.Event = field(default_factory=anyio.Event)

    def count(self, path: str) -> int:
        return sum(asked == path for asked, _ in self.requests)

    async def _serve(self, client: SocketStream) -> None:
        self.open_connections += 1
        try:
            async with client:
                await self._exchange(client)
        except (anyio.BrokenResourceError, anyio.EndOfStream, anyio.ClosedResourceError):
            pass  # the client left, as clients do
        finally:
            self.open_connections -= 1
            self.left.set()

    async def empty(self) -> None:
        """Return when no client is connected; the caller sets a deadline."""
        while self.open_connections:
            self.left = anyio.Event()
            await self.left.wait()

    async def _exchange(self, client: SocketStream) -> None:
        received = b""
        while b"\r\n\r\n" not in received:
            received += await client.receive()
        head, _, body = received.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
        length = int(headers.get("content-length", 0))
        assert length <= MAX_REQUEST_BYTES
        while len(body) < length:
            body += await client.receive()
        path = lines[0].split(" ")[1]
        replies = self.replies.get(path, (answer({"error": {"message": "no such path"}}, 404),))
        reply = replies[min(self.count(path), len(replies) - 1)]
        self.requests.append((path, json.loads(body) if body else None))
        await self._reply(client, reply)

    async def _reply(self, client: SocketStream, reply: Reply) -> None:
        if reply.status:
            declared = f"Content-Length: {reply.length}\r\n" if reply.length is not None else ""
            await client.send(f"HTTP/1.1 {reply.status} X\r\n{declared}Connection: close\r\n\r\n".encode() + reply.body)
        if reply.then == "repeat":
            while True:
                await client.send(reply.body)
        elif reply.then == "hang":
            while True:  # until the client leaves
                await client.receive()
        elif reply.then == "reset":
            raw = client.extra(SocketAttribute.raw_socket)
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@asynccontextmanager
async def fault_server(**replies: Reply | Sequence[Reply]) -> AsyncIterator[FaultServer]:
    """Serve; paths are named without the slash, and are well unless told otherwise."""
    rows = {f"/{path}": (row,) if isinstance(row, Reply) else row for path, row in replies.items()}
    server = FaultServer(WELL | rows)
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    port = listener.extra(SocketAttribute.local_port)
    server.url = f"http://127.0.0.1:{port}"
    async with listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, server._serve)
        try:
            yield server
        finally:
            tasks.cancel_scope.cancel()
