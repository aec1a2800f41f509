"""Processes of fake servers (``campaigns_engines``), as tests start, ask, kill and start them again.

Invariants:

* A server has the same ports in all its lives.
* What it journals outlives it.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from tests.support.paths import ROOT

STOP_DEADLINE_S: Final = 20.0


@dataclass(kw_only=True)
class Server:
    """One server of a farm: ``kind`` is that of the engine, ``proxy`` has the options of the proxy before it.

    Ports are 0 until it has run once; it has the same ones ever after.
    """

    name: str
    kind: str
    how: dict[str, Any] = field(default_factory=dict)
    proxy: dict[str, Any] | None = None
    port: int = 0
    proxy_port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.proxy_port if self.proxy is not None else self.port}"

    def config(self, **more: Any) -> dict[str, Any]:
        """As an engine of a config."""
        return {"kind": self.kind, "name": self.name, "url": self.url} | more


class Farm:
    """A process of servers, as the one that tests start, ask, kill then start again; see the module's docstring."""

    def __init__(self, *servers: Server, journal: Path | None = None) -> None:
        self.servers = {server.name: server for server in servers}
        self.journal = journal
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> Self:
        servers = [asdict(server) for server in self.servers.values()]
        spec = {"servers": servers, "journal": None if self.journal is None else str(self.journal)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.campaigns.engines", json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for name, ports in self._answer().items():
            self.servers[name].port, self.servers[name].proxy_port = ports
        return self

    def order(self, name: str, do: str, **more: Any) -> Any:
        """Have a server do something: ``stall``, ``go``, ``rates``, ``counts``."""
        assert self.process is not None
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"name": name, "do": do} | more) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self.process is not None
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the servers' process ended with {self.process.wait(STOP_DEADLINE_S)}"
        return json.loads(line)

    def kill(self) -> None:
        """As a machine that loses its power."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.close()

    def close(self) -> None:
        if self.process is None:
            return
        process, self.process = self.process, None
        with process:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(STOP_DEADLINE_S)
            except subprocess.TimeoutExpired:
                process.kill()
