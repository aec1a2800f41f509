"""A small `_bulk` endpoint, in place of Elasticsearch: it keeps what a shipper sends, and that endpoint's contract.

``create`` of an ``_id`` that is there is refused with 409, as in a data stream; while it is busy, every seventh new
document is refused once with 429, as by a node without room. What is kept survives :meth:`BulkSink.stop`: a sink can go
and come back.
"""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """A shipper that was killed is no error."""


class BulkSink:
    """``documents`` by ``_id``, ``sent`` how often each was sent; both grow while it runs."""

    def __init__(self) -> None:
        self.documents: dict[str, dict[str, Any]] = {}
        self.sent: dict[str, int] = {}
        self.indices: set[str] = set()
        self.malformed: list[bytes] = []
        self.is_busy = False
        self.port = 0
        self._grown = threading.Condition()
        self._server: ThreadingHTTPServer | None = None

    def start(self) -> None:
        """Listen, at the same port as before if there was one."""
        sink = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                self._answer({})

            do_HEAD = do_GET  # noqa: N815

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                self._answer(sink.take(body))

            def _answer(self, answer: dict[str, Any]) -> None:
                body = json.dumps(answer).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

        self._server = _Server(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Refuse connections from now on."""
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()

    def take(self, body: bytes) -> dict[str, Any]:
        """What ``_bulk`` answers to a body."""
        items = []
        lines = body.splitlines()
        with self._grown:
            for action, document in zip(lines[::2], lines[1::2], strict=True):
                try:
                    ((operation, target),) = json.loads(action).items()
                    items.append({operation: {**target, "status": self._put(operation, target, json.loads(document))}})
                except ValueError:
                    self.malformed.append(action + b"\n" + document)
            self._grown.notify_all()
        return {"took": 1, "errors": any(item["create"]["status"] > 299 for item in items), "items": items}

    def _put(self, operation: str, target: dict[str, str], document: dict[str, Any]) -> int:
        assert operation == "create", "a data stream takes nothing else"
        name = target["_id"]
        self.indices.add(target["_index"])
        is_new = name not in self.sent
        self.sent[name] = self.sent.get(name, 0) + 1
        if name in self.documents:
            return 409
        if self.is_busy and is_new and len(self.sent) % 7 == 0:
            return 429
        self.documents[name] = document
        return 201

    def wait_for(self, names: set[str], deadline_s: float) -> None:
        """Return when all of these are there."""
        with self._grown:
            there = self._grown.wait_for(lambda: names <= self.documents.keys(), deadline_s)
            assert there, f"{len(names - self.documents.keys())} of {len(names)} lines have not arrived"
