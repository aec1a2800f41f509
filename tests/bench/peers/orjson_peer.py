"""A server that keeps samples as lists and answers with JSON: what most rollout servers of today do."""

from __future__ import annotations

import socket
import struct
from typing import Any

import numpy as np
import orjson

LENGTH = struct.Struct("<Q")


def serve(connection: socket.socket, groups: list[dict[str, Any]]) -> None:
    """Answer each byte with the groups."""
    while connection.recv(1):
        body = orjson.dumps({"groups": groups})
        connection.sendall(LENGTH.pack(len(body)))
        connection.sendall(body)


def take(connection: socket.socket) -> int:
    """Ask for a batch and have its columns as arrays, one a group; returns the tokens."""
    connection.sendall(b"g")
    (size,) = LENGTH.unpack(_exactly(connection, LENGTH.size))
    tokens = 0
    for group in orjson.loads(_exactly(connection, size))["groups"]:
        np.array(group["prompt_tokens"], np.int32)
        for name, dtype in (("tokens", np.int32), ("logprobs", np.float32), ("loss_mask", np.uint8)):
            parts = [np.array(sample[name], dtype) for sample in group["samples"]]
            tokens += len(np.concatenate(parts)) if name == "tokens" else 0
    return tokens


def _exactly(connection: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    view, received = memoryview(data), 0
    while received < size:
        count = connection.recv_into(view[received:])
        if not count:
            raise ConnectionError("the other side is gone")
        received += count
    return data
