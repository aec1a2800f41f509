"""Frames read from the daemon's files, whose descriptors came with the answer.

The daemon and its client share a machine, and the frames of a batch lie in the log's files, whose pages are in memory:
one copy from there costs less than the two that a socket makes.

Invariants:

* Frames are copied into memory of the client's own, in the order of the answer, and the descriptors closed: what
  becomes of the files later is the daemon's business, and an array never depends on it.
* Limits are checked before memory is taken. Whatever cannot be read in full raises :class:`Unreadable`; the batch can
  be had through the socket.
"""

from __future__ import annotations

import os
import socket
from array import array
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, NamedTuple

from .buffers import BufferPool, Bytes

__all__ = ["CAN_READ_FILES", "Located", "Unreadable", "close_all", "located", "read_frames", "receive"]

CAN_READ_FILES: Final = hasattr(socket, "SCM_RIGHTS") and hasattr(os, "preadv")

MAX_DESCRIPTORS: Final = 64
"""With one answer; the daemon sends half of it at most."""

CLOSED_ON_EXEC: Final = getattr(socket, "MSG_CMSG_CLOEXEC", 0)

READ_SLICE_BYTES: Final = 4 << 20
"""Other tasks get a turn after so many bytes (about a millisecond)."""

_INT_BYTES: Final = array("i").itemsize


class Unreadable(Exception):
    """The frames cannot be read here: no descriptors came (something stands between), or the file gives too little."""


class Located(NamedTuple):
    """One frame: its descriptor, its byte offset and its length in bytes."""

    descriptor: int
    offset: int
    length: int


def receive(sock: socket.socket, target: memoryview) -> tuple[int, list[int]]:
    """Receive into ``target`` what is there; returns how many bytes, and descriptors that came with them.

    Raises:
        OSError: as ``recv_into``.
    """
    room = socket.CMSG_SPACE(MAX_DESCRIPTORS * _INT_BYTES)
    count, passed, _, _ = sock.recvmsg_into([target], room, CLOSED_ON_EXEC)
    descriptors = array("i")
    for level, kind, data in passed:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(data[: len(data) - len(data) % _INT_BYTES])
    return count, list(descriptors)


def close_all(descriptors: Sequence[int]) -> None:
    """Close what came."""
    for descriptor in descriptors:
        os.close(descriptor)


def located(table: Any, descriptors: Sequence[int], max_bytes: int) -> list[Located]:
    """The frames that an answer's ``frames`` names.

    Raises:
        Unreadable: it names descriptors that did not come, or more bytes than are allowed.
    """
    frames, total = [], 0
    for entry in table if isinstance(table, list) else [None]:
        if not (isinstance(entry, list) and len(entry) == 3 and all(type(value) is int for value in entry)):
            raise Unreadable(f"the place of a frame is {entry!r}; expected [file, offset, length]")
        file, offset, length = entry
        if not (0 <= file < len(descriptors) and offset >= 0 and length >= 0):
            raise Unreadable(f"a frame is in file {file}, but {len(descriptors)} files arrived")
        frames.append(Located(descriptors[file], offset, length))
        total += length
    if total > max_bytes:
        raise Unreadable(f"frames of {total} bytes; at most {max_bytes} are allowed")
    return frames


async def read_frames(frames: Sequence[Located], pool: BufferPool, give_way: Callable[[], Awaitable[None]]) -> Bytes:
    """The frames, one after the other, in memory of the pool.

    Args:
        frames: where they are.
        pool: memory for them.
        give_way: awaited now and then.

    Raises:
        Unreadable: one is not there in full.
    """
    payload = pool.take(sum(frame.length for frame in frames))
    memory, begin, unshared = payload.data, 0, 0
    for descriptor, offset, length in frames:
        end = begin + length
        while begin < end:
            try:
                count = os.preadv(descriptor, [memory[begin : min(end, begin + READ_SLICE_BYTES)]], offset)
            except (OSError, OverflowError) as error:  # no file has an offset of 64 bits
                raise Unreadable(f"cannot read the daemon's file: {error}") from error
            if count == 0:
                raise Unreadable("the daemon's file is shorter than announced")
            begin, offset, unshared = begin + count, offset + count, unshared + count
            if unshared >= READ_SLICE_BYTES:
                await give_way()
                unshared = 0
    return payload
