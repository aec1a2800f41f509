"""Who may connect: by user, and by how many connections there are.

Invariants:

* Who is at the other end is what the kernel says (``SO_PEERCRED``), not what the client says.
* A bound on connections never locks out a trainer while there are connections that hold nothing: the one that was
  silent for longest makes room, those first that never asked for anything. One that holds a rank, a lease, a pause, or
  waits for an answer, is never closed for another.
* Whoever is turned away is told why: the error is sent first, and the first request is read, so that the client gets
  to see it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

import anyio

from orchestrator.errors import NotAllowed, OrchestratorError, TooManyConnections

from .connection import Connection, error_frame

__all__ = ["Peer", "check_user", "evicted", "peer_of", "refused", "to_make_room", "turn_away"]

TURN_AWAY_S: Final = 1.0
"""For the client to read why; it has sent its first request long before."""

_PEERCRED: Final = struct.Struct("3i")


class Peer(NamedTuple):
    """The process at the other end when it connected, and its user."""

    pid: int
    uid: int


def peer_of(sock: socket.socket) -> Peer:
    """Who connected."""
    pid, uid, _ = _PEERCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size))
    return Peer(pid, uid)


def check_user(peer: Peer, allowed: frozenset[int]) -> None:
    """Raise ``NotAllowed`` unless the peer's user is one of these."""
    if peer.uid not in allowed:
        users = ", ".join(map(str, sorted(allowed)))
        raise NotAllowed(
            f"user id {peer.uid} may not use this socket, only {users} may; see consumer.allow_uids",
            data={"uid": peer.uid},
        )


def to_make_room(connections: Iterable[Connection], holds_nothing: Callable[[Connection], bool]) -> Connection | None:
    """The connection to close for a new one, or ``None``.

    Args:
        connections: all, in the order in which they came.
        holds_nothing: whether closing it costs its client no more than connecting again.
    """
    idle: Connection | None = None
    for connection in connections:
        if connection.last_request_at is None:
            return connection
        if (idle is None or connection.last_request_at < (idle.last_request_at or 0.0)) and holds_nothing(connection):
            idle = connection
    return idle


def evicted(limit: int) -> TooManyConnections:
    """What a connection is told that was closed for another."""
    return TooManyConnections(
        f"closed for a new connection: {limit} connections were open, and this one was idle for longest;"
        " reconnect, or raise consumer.max_connections"
    )


def refused(limit: int) -> TooManyConnections:
    """What a connection is told when there is no room for it."""
    return TooManyConnections(
        f"{limit} connections are open and all are in use: close some, or raise consumer.max_connections",
        data={"max_connections": limit},
    )


async def turn_away(sock: socket.socket, why: OrchestratorError) -> None:
    """Tell a peer why it may not connect, and close the connection once it has read that."""
    loop = asyncio.get_running_loop()
    with sock, contextlib.suppress(OSError), anyio.move_on_after(TURN_AWAY_S):
        await loop.sock_sendall(sock, error_frame(None, why))
        sock.shutdown(socket.SHUT_WR)
        while await loop.sock_recv(sock, 4096):  # closed at once, the client's request would fail before it reads
            pass
