"""A stub of the daemon's consumer API, for tests of the client: a real socket, prepared batches, faults on request.

It is not the daemon and shares no code with it: frames are written here with ``struct`` and ``json`` after
``docs/protocol.md``, so that the client is held against the page. It keeps leases as the page says: an acknowledged
batch never comes again, one whose connection ended does, oldest first, and a connection holds two at most.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from orchestrator.frames import encode_group
from tests.support.builders import make_group

Script = Callable[["StubConnection", int, str, dict[str, Any]], bool]
"""``(connection, id, method, params)``: whether it dealt with the request."""

DEADLINE_S = 20


def payload(step: int, *, groups: int = 2, length: int = 3) -> bytes:
    frames = [
        encode_group(
            make_group(
                f"source{i % 2}",
                step * groups + i,
                first_sample=2 * (step * groups + i),
                lengths=(length, length + 1),
                rewards=[float(i), 1.0],
                version=step,
            )
        )
        for i in range(groups)
    ]
    return b"".join(frames)


def frame(header: dict[str, Any], body: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<4sIQ", b"ROL1", len(text), len(body)) + text + body


class StubConnection:
    def __init__(self, daemon: StubDaemon, sock: socket.socket) -> None:
        self.daemon = daemon
        self.sock = sock
        self.held: list[int] = []
        self.waiting: list[int] = []  # ids of get_batch requests
        self.by_file: set[int] = set()  # those of them that would rather read files

    def read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self.sock.recv(size - len(data))
            if not part:
                raise ConnectionError
            data += part
        return data

    def request(self) -> tuple[int, str, dict[str, Any]]:
        magic, header_bytes, payload_bytes = struct.unpack("<4sIQ", self.read(16))
        assert (magic, payload_bytes) == (b"ROL1", 0)
        header = json.loads(self.read(header_bytes))
        return header["id"], header["method"], header["params"]

    def result(self, request_id: int, result: dict[str, Any], body: bytes = b"") -> None:
        self.sock.sendall(frame({"id": request_id, "result": result, "unknown": None}, body))

    def error(self, request_id: int | None, code: str, message: str = "", data: dict[str, Any] | None = None) -> None:
        self.sock.sendall(
            frame({"id": request_id, "error": {"code": code, "message": message or code, "data": data or {}}})
        )

    def batch_result(self, step: int) -> dict[str, Any]:
        return {
            "lease": f"lease-{step}",
            "step": step,
            "policy_version": step,
            "weights": {"source0": 0.5, "source1": 0.5},
            "counts": {"source0": 1, "source1": 1},
            "groups": self.daemon.groups,
        }

    def batch_answer(self, request_id: int, step: int) -> bytes:
        return frame({"id": request_id, "result": self.batch_result(step)}, self.daemon.payloads[step])

    def send_by_file(self, request_id: int, step: int, descriptors: list[int], table: Any) -> None:
        answer = frame({"id": request_id, "result": self.batch_result(step) | {"frames": table}})
        assert socket.send_fds(self.sock, [answer], descriptors) == len(answer)
        for descriptor in descriptors:
            os.close(descriptor)

    def cut(self) -> None:
        self.sock.shutdown(socket.SHUT_RDWR)
        raise ConnectionError


class StubDaemon:
    """Serves ``payloads`` as the batches of steps 0, 1, …; ``seen`` is what was asked, in order."""

    def __init__(self, path: Path, payloads: list[bytes], *, groups: int = 2, script: Script | None = None) -> None:
        self.path = path
        self.payloads = payloads
        self.groups = groups
        self.script = script
        self.files: Callable[[int], tuple[list[int], Any]] | None = None  # step → open descriptors and table
        self.is_old = False  # knows nothing of files, and refuses the parameter
        self.acked: list[int] = []
        self.given_back: list[int] = []
        self.handed_out: list[int] = []
        self.seen: list[tuple[str, dict[str, Any]]] = []
        self.connections: list[StubConnection] = []
        self.changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._listener: socket.socket | None = None

    def __enter__(self) -> StubDaemon:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.path.unlink(missing_ok=True)
        self._listener.bind(str(self.path))
        self._listener.listen()
        self._spawn(self._accept, self._listener)

    def stop(self) -> None:
        assert self._listener is not None
        self._listener.shutdown(socket.SHUT_RDWR)
        self.path.unlink(missing_ok=True)
        self.drop_connections()
        for thread in self._threads:
            thread.join(DEADLINE_S)
            assert not thread.is_alive()
        self._threads = []

    def drop_connections(self) -> None:
        """Break every connection; returns when their leases are free."""
        with self.changed:
            for connection in self.connections:
                with contextlib.suppress(OSError):
                    connection.sock.shutdown(socket.SHUT_RDWR)
            assert self.changed.wait_for(lambda: not self.connections, DEADLINE_S)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, DEADLINE_S)

    def _spawn(self, target: Callable[..., None], *args: Any) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        with listener:
            while True:
                try:
                    sock, _ = listener.accept()
                except OSError:
                    return
                with self.changed:
                    connection = StubConnection(self, sock)
                    self.connections.append(connection)
                self._spawn(self._serve, connection)

    def _serve(self, connection: StubConnection) -> None:
        with connection.sock:
            try:
                while True:
                    self._handle(connection, *connection.request())
            except (ConnectionError, OSError):
                pass
            with self.changed:
                self.connections.remove(connection)
                self.changed.notify_all()

    def _handle(self, connection: StubConnection, request_id: int, method: str, params: dict[str, Any]) -> None:
        with self.changed:
            self.seen.append((method, params))
            self.changed.notify_all()
        if self.script is not None and self.script(connection, request_id, method, params):
            return
        getattr(self, f"_{method}", self._echo)(connection, request_id, params)
        self._hand_out(connection)

    def _echo(self, connection: StubConnection, request_id: int, params: dict[str, Any]) -> None:
        connection.result(request_id, {"echo": params})

    def _hello(self, connection: StubConnection, request_id: int, params: dict[str, Any]) -> None:
        result = {"server": "stub", "protocol": 1, "max_payload": 1 << 30, "params": params}
        connection.result(request_id, result if self.is_old else result | {"by_file": True})

    def _get_batch(self, connection: StubConnection, request_id: int, params: dict[str, Any]) -> None:
        if self.is_old and "by_file" in params:
            connection.error(request_id, "bad_request", "get_batch: Object contains unknown field `by_file`")
            return
        connection.waiting.append(request_id)
        if params.get("by_file"):
            connection.by_file.add(request_id)

    def _ack(self, connection: StubConnection, request_id: int, params: dict[str, Any]) -> None:
        step = int(params["lease"].removeprefix("lease-"))
        with self.changed:
            if step not in self.acked:
                self.acked.append(step)
            self._free(step)
        connection.result(request_id, {})

    def _nack(self, connection: StubConnection, request_id: int, params: dict[str, Any]) -> None:
        step = int(params["lease"].removeprefix("lease-"))
        with self.changed:
            self.given_back.append(step)
            self._free(step)
        connection.result(request_id, {})

    def _free(self, step: int) -> None:
        for connection in self.connections:
            if step in connection.held:
                connection.held.remove(step)
        self.changed.notify_all()

    def _cancel(self, connection: StubConnection, request_id: int, params: dict[str, Any]) -> None:
        if params["id"] in connection.waiting:
            connection.waiting.remove(params["id"])
            connection.error(params["id"], "cancelled")
        connection.result(request_id, {})

    def _next_step(self, connection: StubConnection) -> int | None:
        held = [step for other in self.connections for step in other.held]
        if len(connection.held) >= 2:
            return None
        return next((s for s in range(len(self.payloads)) if s not in self.acked and s not in held), None)

    def _hand_out(self, connection: StubConnection) -> None:
        while connection.waiting:
            with self.changed:
                if len(self.acked) == len(self.payloads):
                    connection.error(connection.waiting.pop(0), "finished")
                    continue
                step = self._next_step(connection)
                if step is None:
                    return
                connection.held.append(step)
                self.handed_out.append(step)
            request_id = connection.waiting.pop(0)
            if self.files is not None and request_id in connection.by_file:
                connection.send_by_file(request_id, step, *self.files(step))
            else:
                connection.sock.sendall(connection.batch_answer(request_id, step))


@contextlib.contextmanager
def stub_daemon(directory: Path, steps: int, *, script: Script | None = None, **shape: Any) -> Iterator[StubDaemon]:
    payloads = [payload(step, **shape) for step in range(steps)]
    with StubDaemon(directory / "s.sock", payloads, groups=shape.get("groups", 2), script=script) as daemon:
        yield daemon
