"""A reward server in a thread, for tests of a daemon that runs in a process of its own; not one of ours."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class RewardServer:
    """``answer`` is called with each request's body; while ``silent`` is set, requests wait."""

    def __init__(self, answer: Callable[[dict[str, Any]], Any], port: int) -> None:
        self.answer = answer
        self.loud = threading.Event()
        self.loud.set()
        self.requests: list[dict[str, Any]] = []
        self.asked = threading.Condition()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server.asked:
                    server.requests.append(body)
                    server.asked.notify_all()
                server.loud.wait(60)
                text = json.dumps(server.answer(body)).encode()
                try:
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(text)))
                    self.end_headers()
                    self.wfile.write(text)
                except OSError:
                    pass  # the daemon has given up

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/score"

    def wait_for(self, requests: int) -> None:
        with self.asked:
            assert self.asked.wait_for(lambda: len(self.requests) >= requests, timeout=30)


@contextmanager
def reward_server(answer: Callable[[dict[str, Any]], Any], *, port: int = 0) -> Iterator[RewardServer]:
    server = RewardServer(answer, port)
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.loud.set()
        server.http.shutdown()
        server.http.server_close()
        thread.join(10)
