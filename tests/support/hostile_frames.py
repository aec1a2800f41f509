"""Bytes that no client means: garbage, requests of wrong shapes, conversations of a real trainer with bytes changed.

What could be meant after all (a changed byte may leave a valid ``set_weight``) is told apart by :func:`is_meant`, so
that a state which changes is a defect and not an order that was followed.
"""

from __future__ import annotations

import json
import random
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from orchestrator.consumer.methods import params as methods
from orchestrator.consumer.socket.requests import Request, parse_request
from orchestrator.core.weights.forms import parse_weight
from orchestrator.errors import BadRequest, FrameError, OrchestratorError
from orchestrator.frames import MAGIC, MAX_HEADER_BYTES, PREFIX_BYTES, encode_frame, parse_prefix
from orchestrator.state import check_name

PREFIX: Final = struct.Struct("<4sIQ")

KINDS: Final[dict[str, type[Any]]] = {
    "hello": methods.Hello,
    "get_batch": methods.GetBatch,
    "ack": methods.Ack,
    "nack": methods.Nack,
    "cancel": methods.Cancel,
    "set_policy_version": methods.SetPolicyVersion,
    "pause_generation": methods.PauseGeneration,
    "continue_generation": methods.NoParams,
    "update_weights": methods.UpdateWeights,
    "engines": methods.Engines,
    "sources": methods.Sources,
    "status": methods.Status,
    "set_weight": methods.SetWeight,
    "pause": methods.Source,
    "resume": methods.Source,
    "save": methods.Save,
    "load": methods.Load,
    "checkpoints": methods.NoParams,
    "verify_checkpoints": methods.VerifyCheckpoints,
    "reload": methods.NoParams,
    "drain": methods.NoParams,
}


# -- a real conversation -----------------------------------------------------------------------------------------------


@contextmanager
def recorded(socket_path: Path, at: Path) -> Iterator[list[bytes]]:
    """A socket at ``at`` that passes everything on to a daemon; the list gets the frames of one client, at its end."""
    frames: list[bytes] = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(at))
        listener.listen()
        thread = threading.Thread(target=_pass_on, args=(listener, socket_path, frames))
        thread.start()
        try:
            yield frames
        finally:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            thread.join(20)


def _pass_on(listener: socket.socket, socket_path: Path, frames: list[bytes]) -> None:
    said = bytearray()
    client, _ = listener.accept()
    with client, socket.socket(socket.AF_UNIX) as daemon:
        daemon.connect(str(socket_path))
        back = threading.Thread(target=_copy, args=(daemon, client))
        back.start()
        while data := client.recv(1 << 16):
            said += data
            daemon.sendall(data)
        daemon.shutdown(socket.SHUT_WR)
        back.join(20)
    while said:
        size = parse_prefix(said).frame_bytes
        frames.append(bytes(said[:size]))
        del said[:size]


def _copy(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)


# -- what could be meant -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """What the daemon knows, so that a request can be told to be in vain."""

    leases: frozenset[str]
    sources: frozenset[str]
    engines: frozenset[str]
    checkpoints: frozenset[str]
    policy_version: int


def requests_in(data: bytes) -> tuple[list[Request], bool]:
    """The requests in some bytes up to the first that is none, and whether that is there and whole."""
    found: list[Request] = []
    while len(data) >= PREFIX_BYTES:
        try:
            prefix = parse_prefix(data, max_payload=0)
            if len(data) < prefix.frame_bytes:
                return found, False
            found.append(parse_request(data[PREFIX_BYTES : prefix.frame_bytes]))
        except FrameError:
            return found, True
        data = data[prefix.frame_bytes :]
    return found, False


def is_meant(request: Request, world: World) -> bool:
    """Whether a daemon should do what this asks, and it changes something."""
    kind = KINDS.get(request.method)
    if kind is None:
        return False
    try:
        params = methods.parse_params(kind, request.method, request.params)
    except BadRequest:
        return False
    return _MEANT[request.method](params, world) if request.method in _MEANT else False


def _weight_is_meant(params: methods.SetWeight, world: World) -> bool:
    if params.source not in world.sources:
        return False
    with suppress(OrchestratorError):
        return params.weight is None or parse_weight(params.weight, directory=Path.cwd()) is not None
    return False


def _can_be_saved(name: str) -> bool:
    try:
        check_name(name)
    except BadRequest:
        return False
    return True


_MEANT: Final[dict[str, Callable[[Any, World], bool]]] = {
    "hello": lambda p, _: p.takeover,
    "ack": lambda p, w: p.lease in w.leases,
    "nack": lambda p, w: p.lease in w.leases,
    "set_policy_version": lambda p, w: p.version >= w.policy_version,
    "pause_generation": lambda _p, _w: True,
    "update_weights": lambda p, w: p.version >= w.policy_version,
    "engines": lambda p, w: p.engine is not None or (p.action != "list" and p.name in w.engines),
    "sources": lambda p, w: p.source is not None or (p.action != "list" and p.name in w.sources),
    "set_weight": _weight_is_meant,
    "pause": lambda p, w: p.source in w.sources,
    "resume": lambda p, w: p.source in w.sources,
    "save": lambda p, _: _can_be_saved(p.name),
    "load": lambda p, w: p.name in w.checkpoints,
    "reload": lambda _p, _w: True,
    "drain": lambda _p, _w: True,
}
"""Methods that change something, and when; a ``get_batch`` does not, as long as a trainer holds the only rank."""


# -- bytes -------------------------------------------------------------------------------------------------------------


class Maker:
    """Makes bytes; the same of the same seed and conversation.

    Args:
        rng: all that is random.
        conversation: the frames of a real one.
        world: see :func:`is_meant`.
    """

    def __init__(self, rng: random.Random, conversation: list[bytes], world: World) -> None:
        self._rng = rng
        self._conversation = conversation
        self._world = world
        self.left_out = 0

    def requests(self, count: int) -> list[bytes]:
        """Frames that hold a request each, none of which is meant."""
        found: list[bytes] = []
        while len(found) < count:
            data = self._rng.choice((self._odd_request, self._odd_request, self._changed_text))()
            asked, is_bad = requests_in(data)
            if len(asked) == 1 and not is_bad and parse_prefix(data).frame_bytes == len(data) and self._is_vain(asked):
                found.append(data)
        return found

    def malformed(self) -> bytes:
        """Bytes that are no frame, or are several, or are not all of one; nothing in them is meant."""
        makers = (self._garbage, self._bad_lengths, self._odd_json, self._changed_bytes, self._changed_bytes)
        while True:
            data = self._rng.choice(makers)()
            if self._is_vain(requests_in(data)[0]):
                return data

    def _is_vain(self, asked: list[Request]) -> bool:
        if any(is_meant(request, self._world) for request in asked):
            self.left_out += 1
            return False
        return True

    # -- malformed ---------------------------------------------------------------------------------------------------

    def _garbage(self) -> bytes:
        return self._rng.randbytes(self._rng.randrange(1, 200))

    def _bad_lengths(self) -> bytes:
        rng = self._rng
        header = rng.choice((0, 1, 7, 100, MAX_HEADER_BYTES, MAX_HEADER_BYTES + 1, 2**31, 2**32 - 1))
        payload = rng.choice((0, 0, 0, 1, 8, 4 << 30, 2**63, 2**64 - 1))
        return PREFIX.pack(MAGIC, header, payload) + rng.randbytes(rng.randrange(120))

    def _odd_json(self) -> bytes:
        """A frame whose header is not JSON, no object, too deep, or of too many values."""
        rng = self._rng
        depth = rng.choice((33, 200, 5_000))
        text: bytes = rng.choice(
            (
                b"[" * depth + b"]" * depth,
                b'{"a":' * depth + b"0" + b"}" * depth,
                b'{"id":1,"method":"status","x":[' + b"[]," * 5_000 + b"0]}",
                b'{"id":1,"method":"' + b'\\"' * rng.choice((3, 10_000)),
                b'{"id":1,"method":"status"' + rng.randbytes(9) + b"}",
                b'{"id":1e999,"method":"status"}',
                b'{"id":NaN,"method":"status"}',
                json.dumps(self._value(3)).encode(),
                "{}".encode("utf-16"),
                b"\xef\xbb\xbf{}",
            )
        )
        return PREFIX.pack(MAGIC, len(text), 0) + text

    def _changed_bytes(self) -> bytes:
        """Frames of the conversation with bytes changed, wherever they are."""
        rng = self._rng
        data = bytearray(b"".join(rng.choices(self._conversation, k=rng.randrange(1, 4))))
        for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
            self._change(data, 0)
        return bytes(data) or b"R"

    def _change(self, data: bytearray, first: int) -> None:
        rng = self._rng
        if len(data) <= first:
            return
        at = rng.randrange(first, len(data))
        match rng.randrange(6):
            case 0:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at] = rng.randrange(256)
            case 2:
                data[at:at] = rng.choice((b"0", b"9", b'"', b"{", b",", b"\\", b"-", rng.randbytes(3)))
            case 3:
                del data[at : at + rng.randrange(1, 9)]
            case 4:
                data[at:at] = data[at : at + rng.randrange(1, 40)]
            case 5:
                other = rng.choice(self._conversation)
                begin = rng.randrange(len(other))
                data[at : at + 8] = other[begin : begin + 8]

    # -- requests ----------------------------------------------------------------------------------------------------

    def _changed_text(self) -> bytes:
        """A frame of the conversation with its text changed and its length right."""
        data = bytearray(self._rng.choice(self._conversation))
        for _ in range(self._rng.choice((1, 1, 2, 4))):
            self._change(data, PREFIX_BYTES)
        return PREFIX.pack(MAGIC, len(data) - PREFIX_BYTES, 0) + bytes(data[PREFIX_BYTES:])

    def _odd_request(self) -> bytes:
        rng = self._rng
        header: dict[str, Any] = {"id": rng.choice((0, 1, -1, 2**63 - 1, -(2**63), rng.randrange(1000)))}
        header["method"] = rng.choice((*KINDS, *KINDS, "", "get_batchx", "__init__", "a" * 300, "\x00", "é𝄞"))
        kind = KINDS.get(header["method"])
        names = [*(kind.__struct_fields__ if kind is not None else ()), "nonsense"]
        header["params"] = {name: self._value(2) for name in names if rng.random() < 0.6}
        if rng.random() < 0.1:
            header["more"] = self._value(3)
        return encode_frame(header)

    def _value(self, depth: int) -> Any:
        rng, world = self._rng, self._world
        match rng.randrange(13 if depth else 10):
            case 0:
                return None
            case 1:
                return rng.choice((True, False))
            case 2:
                return rng.choice((0, 1, -1, 2, 65_535, 65_536, 2**31, 2**53, 2**63 - 1, -(2**63), 2**64 - 1))
            case 3:
                return rng.choice((0.0, -0.0, 1e-308, -1.5, 1e308, 604_800.5, 5e-324))
            case 4:
                return rng.choice(
                    ("", "a", "0", "keep", "abort", "list", "../../etc/passwd", "\x00", "é𝄞", "x" * 5_000)
                )
            case 5:
                return rng.choice(sorted(world.sources | world.engines | world.checkpoints))
            case 6:
                lease = rng.choice(sorted(world.leases))
                return rng.choice((lease, lease.replace(".0", ".00"), lease + ".0", lease[:-1] + "٠", lease.upper()))
            case 7:
                return rng.choice(("lambda step: step", "lambda step: 1/0", "lambda: 1", "os.system", "a.b.c.d"))
            case 8 | 9:
                return rng.randrange(10)
            case 10:
                return [self._value(depth - 1) for _ in range(rng.randrange(4))]
            case 11:
                return {rng.choice(("a", "b", "id", "")): self._value(depth - 1) for _ in range(rng.randrange(4))}
            case _:
                return "".join(chr(rng.randrange(1, 0xD7FF)) for _ in range(rng.randrange(20)))
