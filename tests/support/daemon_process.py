"""A real daemon in a process of its own, for tests that start, ask, kill then start again."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from orchestrator.client import RolloutClient
from orchestrator.errors import ConnectionLost
from tests.support.paths import ROOT

START_DEADLINE_S = 30.0
TRY_S = 0.1
"""A client waits longer and longer for a daemon that does not listen yet; a new one asks often again."""
STOP_DEADLINE_S = 30.0
LOOK_S = 0.01
"""Between two looks at a file that another process writes: who looks without a pause takes its core."""


def write_prompts(path: Path, rows: int, *, text: str = "prompt") -> Path:
    path.write_text("".join(json.dumps({"prompt": f"{text} {i}=", "label": str(i)}) + "\n" for i in range(rows)))
    return path


def write_config(folder: Path, **changes: Any) -> Path:
    """A config of two sources and a scripted engine, with sections overlaid by ``changes``."""
    for name in ("easy", "hard"):
        if not (folder / f"{name}.jsonl").exists():
            write_prompts(folder / f"{name}.jsonl", 100, text=name)
    config: dict[str, Any] = {
        "run": {"name": "test", "seed": 3, "state_dir": "state"},
        "rollout": {"rollout_batch_size": 4, "n_samples_per_prompt": 2},
        "sampling": {"max_new_tokens": 8},
        "engines": [{"kind": "scripted", "time_scale": 0.0}],
        "data_sources": [
            {"name": "easy", "prompts": {"path": "easy.jsonl"}, "reward": "contains"},
            {"name": "hard", "prompts": {"path": "hard.jsonl"}, "reward": "contains"},
        ],
        "data_source_weights": [0.7, 0.3],
        "consumer": {"socket": "sock"},
        "status": {"http": None},
        "logging": {"file": "log.jsonl"},
    }
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(config.get(key), dict):
            config[key].update(value)
        else:
            config[key] = value
    path = folder / "config.yaml"
    path.write_text(json.dumps(config, indent=1))
    return path


class DaemonProcess:
    """One daemon on one config; may be started again after it ended. It runs in ``directory``."""

    def __init__(self, config: Path, *, directory: Path = ROOT) -> None:
        self.config = config
        self.directory = directory
        self.socket = config.parent / "sock"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *options: str) -> DaemonProcess:
        with (self.config.parent / "stderr").open("ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "error", "-m", "orchestrator", "run", str(self.config), *options],
                stdout=errors,
                stderr=errors,
                cwd=self.directory,
            )
        return self

    def connect(self, **kwargs: Any) -> RolloutClient:
        """A client, once the daemon listens."""
        assert self.process is not None
        deadline = time.monotonic() + START_DEADLINE_S
        while True:
            client = RolloutClient(self.socket, connect_timeout_s=1.0, **kwargs)
            try:
                client.connect(TRY_S)
            except ConnectionLost:
                assert self.process.poll() is None, self.stderr
                assert time.monotonic() < deadline, self.stderr
            else:
                return client

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def wait(self) -> int:
        assert self.process is not None
        return self.process.wait(STOP_DEADLINE_S)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.wait()

    def stop(self) -> int:
        self.signal(signal.SIGTERM)
        return self.wait()

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    @property
    def stderr(self) -> str:
        return (self.config.parent / "stderr").read_text(errors="replace")

    @property
    def log(self) -> list[dict[str, Any]]:
        """The log's lines; the last one may be half written yet."""
        whole, _, _ = (self.config.parent / "log.jsonl").read_text().rpartition("\n")
        return [json.loads(line) for line in whole.splitlines()]

    def wait_for_line(self, text: str) -> None:
        """Until a line says so: lines are written by a thread of the daemon's, after what they tell of."""
        deadline = time.monotonic() + START_DEADLINE_S
        while not any(text in line["message"] for line in self.log):
            assert time.monotonic() < deadline, f"no line says {text!r}"
            time.sleep(LOOK_S)


@contextmanager
def daemon(config: Path) -> Iterator[DaemonProcess]:
    """A running daemon; killed at the end if it still runs."""
    process = DaemonProcess(config).start()
    try:
        yield process
    finally:
        process.close()
