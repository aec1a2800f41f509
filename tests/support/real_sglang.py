"""A real SGLang server on the CPU, and routers in front of it, as processes of a test (``scripts/test-sglang``)."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Final

HOME: Final = Path(os.environ["ORCHESTRATOR_TEST_SGLANG"]) if "ORCHESTRATOR_TEST_SGLANG" in os.environ else None
"""Where ``scripts/test-sglang`` installed everything; ``None``: these tests are skipped."""

START_DEADLINE_S: Final = 400.0
"""A start imports for a minute on an idle machine, and for several on a busy one."""

END_DEADLINE_S: Final = 20.0
CONTEXT_TOKENS: Final = 1024

OPTIONS: Final = (
    "--device cpu --attention-backend torch_native --sampling-backend pytorch --grammar-backend none"
    " --disable-cuda-graph --disable-overlap-schedule --mem-fraction-static 0.05 --max-total-tokens 65536"
    f" --max-running-requests 64 --context-length {CONTEXT_TOKENS} --enable-metrics"
).split()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Process:
    """A server program in a process group of its own; its output goes to a file."""

    def __init__(self, name: str, port: int) -> None:
        assert HOME is not None
        self.name = name
        self.port = port
        self.log = HOME / f"{name}-{port}.log"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def launch(self, command: Sequence[str], environment: dict[str, str]) -> None:
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True, env=os.environ | environment
            )

    def wait_until_ready(self, path: str) -> None:
        end = time.monotonic() + START_DEADLINE_S
        while not self._answers(path):
            assert self.process is not None
            assert self.process.poll() is None, self.log.read_text(errors="replace")[-4000:]
            assert time.monotonic() < end, f"{self.name} did not start: see {self.log}"
            time.sleep(0.5)  # nobody tells when a foreign program is ready

    def _answers(self, path: str) -> bool:
        try:
            with urllib.request.urlopen(self.url + path, timeout=30) as answer:
                return int(answer.status) == 200
        except (urllib.error.URLError, OSError):
            return False

    def signal_group(self, number: int) -> None:
        assert self.process is not None
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            return

    def kill(self) -> None:
        """SIGKILL to all of its processes."""
        if self.process is not None:
            self.signal_group(signal.SIGKILL)
            self.process.wait(END_DEADLINE_S)


class RealSGLang(Process):
    """One server; ``options`` are added to :data:`OPTIONS`."""

    def __init__(self, *options: str, model: str = "first", port: int | None = None) -> None:
        super().__init__("sglang", port or free_port())
        self.options = options
        self.model = model

    def start(self) -> RealSGLang:
        assert HOME is not None
        command = [str(HOME / "venv/bin/python"), "-m", "sglang.launch_server", *OPTIONS, *self.options]
        command += ["--model-path", self.model_path(self.model), "--host", "127.0.0.1", "--port", str(self.port)]
        self.launch(command, {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
        return self

    def ready(self) -> RealSGLang:
        self.wait_until_ready("/health")
        return self

    @staticmethod
    def model_path(name: str) -> str:
        assert HOME is not None
        return str(HOME / "models" / name)


class Router(Process):
    """``sglang-router`` or ``smg`` in front of servers."""

    def __init__(self, program: str, workers: Sequence[str]) -> None:
        super().__init__(program, free_port())
        self.program = program
        self.workers = workers

    def start(self) -> Router:
        assert HOME is not None
        program = str(HOME / "routers/bin" / self.program)
        command = [program, "launch", "--worker-urls", *self.workers, "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--prometheus-port", str(free_port())]
        self.launch(command, {})
        return self

    def ready(self) -> Router:
        self.wait_until_ready("/health")
        return self
