"""A client of the consumer API written from docs/protocol.md alone, to keep that page sufficient.

Standard library and numpy; nothing of the project is imported.
"""

from __future__ import annotations

import itertools
import json
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

MAGIC = b"ROL1"
PREFIX = struct.Struct("<4sIQ")
LARGEST_HEADER = 1 << 20
LARGEST_PAYLOAD = 4 << 30
DTYPES = {"U8": "u1", "I32": "<i4", "I64": "<i8", "F32": "<f4"}
COLUMNS = {
    "prompt_tokens": "I32",
    "response_offsets": "I64",
    "response_tokens": "I32",
    "logprobs": "F32",
    "loss_mask": "U8",
    "text_offsets": "I64",
    "text": "U8",
}
LARGE_VALUES = ("prompt", "label", "metadata")
"""Header keys that are columns of JSON where they are large."""


class Refused(Exception):
    """The daemon answered with an error."""

    def __init__(self, code: str, message: str, data: dict[str, Any] | None = None) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.data = data or {}


@dataclass(frozen=True)
class Group:
    header: dict[str, Any]
    columns: dict[str, np.ndarray] = field(compare=False)  # views of the payload
    payload: bytes

    def text(self, sample: int) -> str:
        begin, end = self.columns["text_offsets"][sample : sample + 2]
        return self.columns["text"][begin:end].tobytes().decode()

    def response(self, column: str, sample: int) -> np.ndarray:
        """A sample's part of `response_tokens`, `logprobs` or `loss_mask`."""
        begin, end = self.columns["response_offsets"][sample : sample + 2]
        return self.columns[column][begin:end]


@dataclass(frozen=True)
class Batch:
    result: dict[str, Any]
    groups: list[Group]
    payload: bytes = field(repr=False)


def unpack_prefix(prefix: bytes) -> tuple[int, int]:
    magic, header, payload = PREFIX.unpack(prefix)
    if magic != MAGIC or header > LARGEST_HEADER or payload > LARGEST_PAYLOAD:
        raise ValueError(f"not a frame: {prefix!r}")
    return header, payload


def split_groups(payload: bytes) -> Iterator[Group]:
    """The group frames that lie one after the other in a batch's payload."""
    at = 0
    while at < len(payload):
        header_size, payload_size = unpack_prefix(payload[at : at + PREFIX.size])
        begin = at + PREFIX.size + header_size
        at = begin + payload_size
        if at > len(payload):
            raise ValueError("the last group frame is cut off")
        yield read_group(payload[begin - header_size : begin], payload[begin:at])


def read_group(header_bytes: bytes, payload: bytes) -> Group:
    header = json.loads(header_bytes)
    columns = {}
    for name, (dtype, begin, end) in header["columns"].items():
        if name not in COLUMNS and name not in LARGE_VALUES:
            continue  # readers ignore the columns that they do not know
        if dtype != COLUMNS.get(name, "U8") or begin % 8 or not 0 <= begin <= end <= len(payload):
            raise ValueError(f"column {name} is {dtype} [{begin}, {end}) of {len(payload)} bytes")
        if name in LARGE_VALUES:
            header[name] = json.loads(payload[begin:end])
        else:
            columns[name] = np.frombuffer(payload[begin:end], DTYPES[dtype])
    return Group(header, columns, payload)


class ProtocolClient:
    """One connection; requests one at a time, answers matched by their id."""

    def __init__(self, path: str, timeout_s: float = 60) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(timeout_s)
        self._ids = itertools.count(1)
        try:
            self._socket.connect(path)
        except BaseException:
            self._socket.close()
            raise

    def request(self, method: str, **params: Any) -> dict[str, Any]:
        return self._call(method, params)[0]

    def get_batch(self, **params: Any) -> Batch:
        result, payload = self._call("get_batch", params)
        return Batch(result, list(split_groups(payload)), payload)

    def ack(self, lease: str) -> None:
        self.request("ack", lease=lease)

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> ProtocolClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, method: str, params: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        request_id = next(self._ids)
        request = json.dumps({"id": request_id, "method": method, "params": params}).encode()
        self._socket.sendall(PREFIX.pack(MAGIC, len(request), 0) + request)
        header_size, payload_size = unpack_prefix(self._read(PREFIX.size))
        answer = json.loads(self._read(header_size))
        payload = self._read(payload_size)
        if "error" in answer:  # with the id null where the frame itself was at fault
            raise Refused(**{key: answer["error"].get(key) for key in ("code", "message", "data")})
        if answer["id"] != request_id:
            raise ValueError(f"an answer to {answer['id']}, which is not pending")
        return answer["result"], payload

    def _read(self, size: int) -> bytes:
        data = bytearray(size)
        rest = memoryview(data)
        while rest:
            count = self._socket.recv_into(rest)
            if not count:
                raise ConnectionError("the daemon closed the connection")
            rest = rest[count:]
        return bytes(data)
