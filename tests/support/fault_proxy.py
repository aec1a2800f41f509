"""A TCP proxy on loopback that spoils what it relays: resets, cuts, garbage, silence, delays, refused connections.

Invariants:

* What happens to a connection is a function of the seed and of the connection's number, never of time.
* ``counts`` says what was really done: a fault in the middle of a reply counts when it strikes, and a reply that is
  shorter than the place where it would strike comes through whole.
* A fault never makes one valid reply of another: garbage consists of bytes that no HTTP server of ours ever sends.
* Every task and every socket belongs to :meth:`FaultProxy.run` and ends with it.
"""

from __future__ import annotations

import random
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, fields
from typing import Final

import anyio
from anyio.abc import SocketAttribute, SocketStream, TaskGroup, TaskStatus

RESET: Final = struct.pack("ii", 1, 0)
"""SO_LINGER: on, 0 s. Closing such a socket resets its connection."""

LISTEN_DEADLINE_S: Final = 10.0
"""To get the same port again after it was closed for a while."""

GARBAGE: Final = range(0x80, 0xC0)
"""Continuation bytes: neither ASCII nor the beginning of anything in UTF-8."""

LONGEST_GARBAGE: Final = 40

SPARED: Final = frozenset(b"\r\ndata: ")
"""Bytes that garbage leaves alone: lines stay lines, and fields of events what they are. It is what they say that must
be noticed; a reader may pass over a field that it does not know."""

THROTTLED_BYTES: Final = 256

PEEK_BYTES: Final = 8192


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Shares of connections to which something happens; they add up to 1 at most, the rest is relayed as it is.

    ``latency``: comes late by ``latency_s``; ``throttle``: comes at ``bytes_per_s``; ``reset``: is reset instead of a
    reply; ``reset_in_reply``, ``truncate`` (a clean close), ``garbage`` (over what was there) and ``silence_in_reply``
    strike after ``strike_bytes`` of the reply; ``silence``: is accepted, and nothing ever comes; ``refuse``: is reset,
    and for ``refuse_s`` nobody listens.
    """

    latency: float = 0.0
    throttle: float = 0.0
    reset: float = 0.0
    reset_in_reply: float = 0.0
    truncate: float = 0.0
    garbage: float = 0.0
    silence: float = 0.0
    silence_in_reply: float = 0.0
    refuse: float = 0.0


KINDS: Final = tuple(field.name for field in fields(Rates))

IN_REPLY: Final = frozenset({"reset_in_reply", "truncate", "garbage", "silence_in_reply"})


class _Leave(Exception):
    """This connection is over."""


class FaultProxy:
    """See the module's invariants.

    Args:
        target_port: of the server on loopback behind it.
        rates: see :class:`Rates`; may be changed at any time, for connections to come.
        seed: of all draws.
        port: to listen on; 0: any.
        only: prefixes of paths that faults are for, such as ``/generate``; none: all.
        latency_s: least and most seconds of ``latency``.
        strike_bytes: least and most bytes of a reply before a fault strikes in it.
        bytes_per_s: of ``throttle``.
        refuse_s: of ``refuse``.
    """

    def __init__(
        self,
        target_port: int,
        rates: Rates,
        *,
        seed: int = 0,
        port: int = 0,
        only: tuple[str, ...] = (),
        latency_s: tuple[float, float] = (0.05, 0.5),
        strike_bytes: tuple[int, int] = (1, 2000),
        bytes_per_s: float = 20_000.0,
        refuse_s: float = 0.5,
    ) -> None:
        self.rates = rates
        self.port = port
        self.counts: Counter[str] = Counter()
        self.open_connections = 0
        self._target_port = target_port
        self._seed = seed
        self._only = tuple(path.encode() for path in only)
        self._latency_s = latency_s
        self._strike_bytes = strike_bytes
        self._bytes_per_s = bytes_per_s
        self._refuse_s = refuse_s
        self._listening = anyio.CancelScope()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Relay until cancelled; ready when it listens."""
        async with anyio.create_task_group() as connections:
            is_first = True
            while True:
                with anyio.fail_after(LISTEN_DEADLINE_S):
                    listener = await self._listen()
                self._listening = anyio.CancelScope()
                async with listener:
                    if is_first:
                        task_status.started()
                        is_first = False
                    with self._listening:
                        await listener.serve(self._serve, connections)
                await anyio.sleep(self._refuse_s)

    async def _listen(self) -> anyio.abc.Listener[SocketStream]:
        while True:
            try:
                listener = await anyio.create_tcp_listener(local_host="127.0.0.1", local_port=self.port)
            except OSError:
                if not self.port:
                    raise
                await anyio.sleep(0.05)  # a connection of somebody else has this port for the moment
            else:
                self.port = listener.extra(SocketAttribute.local_port)
                return listener

    # -- one connection ------------------------------------------------------------------------------------------------

    async def _serve(self, client: SocketStream) -> None:
        self.counts["connections"] += 1
        draw = random.Random(f"{self._seed}/{self.counts['connections']}")
        self.open_connections += 1
        try:
            async with client:
                first = await client.receive(PEEK_BYTES)
                fault = self._fault(draw, first)
                await self._strike_before(fault, draw, client)
                async with (
                    await anyio.connect_tcp("127.0.0.1", self._target_port) as server,
                    anyio.create_task_group() as tasks,
                ):
                    await server.send(first)
                    tasks.start_soon(self._forward, client, server, tasks)
                    await self._reply(fault, draw, server, client)
                    tasks.cancel_scope.cancel()
        except* (_Leave, OSError, anyio.BrokenResourceError, anyio.ClosedResourceError, anyio.EndOfStream):
            pass  # one of the two sides left, as sides do
        finally:
            self.open_connections -= 1

    def _fault(self, draw: random.Random, first: bytes) -> str | None:
        path = first.split(b" ", 2)[1:2]
        at = draw.random()
        if self._only and not (path and path[0].startswith(self._only)):
            return None
        for kind in KINDS:
            rate: float = getattr(self.rates, kind)
            if at < rate:
                return kind
            at -= rate
        return None

    async def _strike_before(self, fault: str | None, draw: random.Random, client: SocketStream) -> None:
        """What happens before the server is asked; raises ``_Leave`` if that is all."""
        if fault is None or fault in IN_REPLY:
            return
        self.counts[fault] += 1
        match fault:
            case "latency":
                await anyio.sleep(draw.uniform(*self._latency_s))
            case "reset":
                _reset(client)
                raise _Leave
            case "refuse":
                _reset(client)
                self._listening.cancel()
                raise _Leave
            case "silence":
                await _until_it_leaves(client)

    async def _forward(self, client: SocketStream, server: SocketStream, tasks: TaskGroup) -> None:
        """What the client says; when it leaves, all is over."""
        try:
            while True:
                await server.send(await client.receive())
        except (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
            tasks.cancel_scope.cancel()

    async def _reply(self, fault: str | None, draw: random.Random, server: SocketStream, client: SocketStream) -> None:
        left = draw.randint(*self._strike_bytes) if fault in IN_REPLY else None
        async for part in server:
            if fault == "throttle":
                await self._trickle(part, client)
            elif left is None or len(part) <= left:
                left = left if left is None else left - len(part)
                await client.send(part)
            else:
                assert fault is not None
                self.counts[fault] += 1
                await client.send(part[:left])
                await self._strike(fault, client)
                await client.send(_spoilt(part[left:], draw))
                left = None

    async def _trickle(self, part: bytes, client: SocketStream) -> None:
        for begin in range(0, len(part), THROTTLED_BYTES):
            piece = part[begin : begin + THROTTLED_BYTES]
            await anyio.sleep(len(piece) / self._bytes_per_s)
            await client.send(piece)

    async def _strike(self, fault: str, client: SocketStream) -> None:
        """What happens in the middle of a reply; raises ``_Leave`` if nothing more comes of it."""
        match fault:
            case "reset_in_reply":
                _reset(client)
                raise _Leave
            case "truncate":
                raise _Leave
            case "silence_in_reply":
                await anyio.sleep_forever()  # until the client leaves


def _reset(client: SocketStream) -> None:
    client.extra(SocketAttribute.raw_socket).setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)


def _spoilt(part: bytes, draw: random.Random) -> bytes:
    """The same number of bytes, so that only who reads what they say can notice; at least one is another."""
    spoilt, left = bytearray(part), draw.randint(1, LONGEST_GARBAGE)
    for i, byte in enumerate(part):
        if left and byte not in SPARED:
            spoilt[i], left = draw.choice(GARBAGE), left - 1
    return bytes(spoilt)


async def _until_it_leaves(client: SocketStream) -> None:
    while True:
        await client.receive()


@asynccontextmanager
async def fault_proxy(target_port: int, rates: Rates, **how: object) -> AsyncIterator[FaultProxy]:
    """A proxy that runs for as long as the body."""
    proxy = FaultProxy(target_port, rates, **how)  # type: ignore[arg-type]
    async with anyio.create_task_group() as tasks:
        await tasks.start(proxy.run)
        try:
            yield proxy
        finally:
            tasks.cancel_scope.cancel()
