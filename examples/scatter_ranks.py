"""Rank 0 takes whole batches from the daemon and scatters them to ranks on other nodes.

A Unix socket works on one node only. Ranks on the daemon's node connect by themselves
(``RolloutClient(rank=…, world_size=…)``, which copies nothing between processes). For ranks on other nodes, one process
next to the daemon takes the batch and passes the groups on, byte for byte as received. This example uses plain TCP;
with ``torch.distributed``, use ``scatter`` and ``barrier`` in the same places.

Try it on one machine. The ``rollout_batch_size`` of the running daemon has to be a multiple of the number of ranks, as
in ``config/minimal.yaml``::

    python examples/scatter_ranks.py --rank 0 --world-size 2 --port 29500 &
    python examples/scatter_ranks.py --rank 1 --world-size 2 --port 29500

A batch is acknowledged when every rank has reported that it is done. If one rank dies, the whole batch is handed out
again.
"""

from __future__ import annotations

import argparse
import contextlib
import socket
import struct
import time
from collections.abc import Sequence

from orchestrator.client import RolloutClient, RolloutGroup

TIMEOUT_S = 600.0
"""Longest silence of another rank."""

START_S = 60.0
"""How long rank 0 may take to listen."""

LENGTH = struct.Struct("<Q")
DONE = b"d"


def share_out(groups: Sequence[RolloutGroup], world_size: int) -> list[list[RolloutGroup]]:
    """An equal number of groups for each rank, balanced by tokens: longest first, to the rank with the fewest tokens.

    Raises:
        ValueError: the groups cannot be shared equally.
    """
    if len(groups) % world_size:
        raise ValueError(
            f"{len(groups)} groups cannot be shared equally among {world_size} ranks: make rollout_batch_size a"
            f" multiple of {world_size}"
        )
    size = len(groups) // world_size
    shares: list[list[RolloutGroup]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for group in sorted(groups, key=lambda group: -len(group.response_tokens)):
        rank = min((r for r in range(world_size) if len(shares[r]) < size), key=lambda r: loads[r])
        shares[rank].append(group)
        loads[rank] += len(group.response_tokens)
    return shares


def train(rank: int, groups: Sequence[RolloutGroup]) -> None:
    """A trainer would do its step here."""
    tokens = sum(len(group.response_tokens) for group in groups)
    print(f"rank {rank}: {len(groups)} groups, {tokens} response tokens", flush=True)


def send(sock: socket.socket, groups: Sequence[RolloutGroup]) -> None:
    """Send the total length, then the group frames unchanged. No groups: the end."""
    frames = [group.frame.buffer for group in groups]
    sock.sendall(LENGTH.pack(sum(map(len, frames))))
    for frame in frames:
        sock.sendall(frame)


def read(sock: socket.socket, size: int) -> bytearray:
    """Exactly ``size`` bytes.

    Raises:
        ConnectionError: the other side closed the connection.
    """
    data, done = bytearray(size), 0
    while done < size:
        count = sock.recv_into(memoryview(data)[done:])
        if not count:
            raise ConnectionError("the other rank closed the connection")
        done += count
    return data


def receive(sock: socket.socket) -> list[RolloutGroup]:
    """The groups of one step; none at the end."""
    (size,) = LENGTH.unpack(read(sock, LENGTH.size))
    return RolloutGroup.from_frames(read(sock, size))


def lead(client: RolloutClient, peers: Sequence[socket.socket]) -> None:
    """Rank 0: take, scatter, train, wait for the others; asking for the next batch acknowledges this one."""
    for batch in client.batches():
        shares = share_out(batch.groups, len(peers) + 1)
        for peer, share in zip(peers, shares[1:], strict=True):
            send(peer, share)
        train(0, shares[0])
        for peer in peers:
            read(peer, len(DONE))
    for peer in peers:
        send(peer, [])


def join(host: str, port: int) -> socket.socket:
    """A connection to rank 0, which may still be starting.

    Raises:
        ConnectionRefusedError: it does not listen within ``START_S``.
    """
    give_up_at = time.monotonic() + START_S
    while True:
        try:
            return socket.create_connection((host, port), timeout=TIMEOUT_S)
        except ConnectionRefusedError:
            if time.monotonic() > give_up_at:
                raise
        time.sleep(0.1)


def follow(rank: int, leader: socket.socket) -> None:
    """Any other rank: receive, train, report."""
    while groups := receive(leader):
        train(rank, groups)
        leader.sendall(DONE)


def main() -> None:
    """Run one rank."""
    parser = argparse.ArgumentParser(description="Scatter batches to ranks on other nodes.")
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--world-size", type=int, required=True)
    parser.add_argument("--host", default="127.0.0.1", help="where rank 0 listens")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--socket", help="the daemon's socket (rank 0)")
    args = parser.parse_args()
    if args.rank > 0:
        with join(args.host, args.port) as leader:
            follow(args.rank, leader)
        return
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server((args.host, args.port)))
        listener.settimeout(TIMEOUT_S)
        print("rank 0 listens", flush=True)
        peers = [stack.enter_context(listener.accept()[0]) for _ in range(args.world_size - 1)]
        for peer in peers:
            peer.settimeout(TIMEOUT_S)
        lead(stack.enter_context(RolloutClient(args.socket, client="scatter")), peers)


if __name__ == "__main__":
    main()
