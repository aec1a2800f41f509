"""A client written from ``docs/protocol.md`` alone: standard library and numpy, nothing of this project."""

from __future__ import annotations

import itertools
import json
import socket
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

MAX_HEADER = 1 << 20
MAX_PAYLOAD = 4 << 30
DTYPES = {"U8": "<u1", "I32": "<i4", "I64": "<i8", "F32": "<f4"}


@dataclass
class Frame:
    """One frame: its header, its payload, and all of its bytes."""

    header: dict[str, Any]
    payload: memoryview
    raw: bytes

    def column(self, name: str) -> np.ndarray:
        dtype, begin, end = self.header["columns"][name]
        assert begin % 8 == 0
        return np.frombuffer(self.payload[begin:end], DTYPES[dtype])

    def sample_column(self, name: str, i: int) -> np.ndarray:
        offsets = self.column("text_offsets" if name == "text" else "response_offsets")
        return self.column(name)[offsets[i] : offsets[i + 1]]


def split_frames(data: bytes) -> list[Frame]:
    """Frames that lie one after the other."""
    frames, at = [], 0
    while at < len(data):
        magic, header, payload = struct.unpack_from("<4sIQ", data, at)
        assert magic == b"ROL1"
        begin, end = at + 16 + header, at + 16 + header + payload
        frames.append(Frame(json.loads(data[at + 16 : begin]), memoryview(data)[begin:end], data[at:end]))
        at = end
    return frames


class PageClient:
    """Requests one after the other over one connection."""

    def __init__(self, path: str, timeout_s: float = 90.0) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(timeout_s)
        self._socket.connect(path)
        self._ids = itertools.count(1)

    def close(self) -> None:
        self._socket.close()

    def _read(self, size: int) -> bytes:
        data = bytearray(size)
        view = memoryview(data)
        while view:
            count = self._socket.recv_into(view)
            if not count:
                raise ConnectionError("the daemon closed the connection")
            view = view[count:]
        return bytes(data)

    def request(self, method: str, **params: Any) -> tuple[dict[str, Any], bytes]:
        """The result of a request, and its payload; an error is raised."""
        number = next(self._ids)
        header = json.dumps({"id": number, "method": method, "params": params}).encode()
        self._socket.sendall(struct.pack("<4sIQ", b"ROL1", len(header), 0) + header)
        magic, size, payload = struct.unpack("<4sIQ", self._read(16))
        assert magic == b"ROL1"
        assert size <= MAX_HEADER
        assert payload <= MAX_PAYLOAD
        answer = json.loads(self._read(size))
        body = self._read(payload)
        assert answer["id"] == number
        if "error" in answer:
            raise RuntimeError(f"{answer['error']['code']}: {answer['error']['message']}")
        return answer["result"], body

    def get_batch(self, timeout_s: float = 60.0) -> tuple[dict[str, Any], list[Frame]]:
        result, body = self.request("get_batch", timeout_s=timeout_s)
        groups = split_frames(body)
        assert len(groups) == result["groups"]
        return result, groups

    def ack(self, lease: str) -> None:
        self.request("ack", lease=lease)
