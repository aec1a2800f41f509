"""For the torture scripts: a real daemon in a forked process with a short cycle, and strace.

The daemon is the one that ``orchestrator run`` starts, from its config file on. It is forked from a process that has
imported everything, so that hundreds can be killed in minutes, and it waits for a word before it begins, so that a
tracer can be attached. Only sizes and intervals are changed: segments of a few kilobytes, snapshots after a few more,
one worker thread, so that the k-th system call is the same one in every run.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from orchestrator.state import store as state_store
from tests.support.daemon_process import write_config
from tests.torture.client import Talk
from tests.torture.model import ROWS, SIZES, must

START_DEADLINE_S = 30.0


def short_cycle(segment_bytes: int = 24 << 10, snapshot_bytes: int = 16 << 10) -> None:
    """In this process, make a whole cycle of the state store take tens of records."""
    state_store.SEGMENT_BYTES = segment_bytes  # type: ignore[misc]
    state_store.SNAPSHOT_LOG_BYTES = snapshot_bytes  # type: ignore[misc]
    state_store.SNAPSHOT_INTERVAL_S = 0.2  # type: ignore[misc]


def prepare(folder: Path, **changes: Any) -> Path:
    """A config for torture, in a new folder; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in SIZES:
        lines = (f'{{"prompt": "{name} {i}=", "label": "{i}"}}\n' for i in range(ROWS))
        (folder / f"{name}.jsonl").write_text("".join(lines))
    sources = [
        {"name": name, "prompts": {"path": f"{name}.jsonl", "shuffle": False}, "reward": "contains"} for name in SIZES
    ]
    run = {"name": "torture", "seed": 3, "state_dir": "state", "keep_checkpoints": 2}
    settings = {
        "run": run,
        "data_sources": sources,
        "data_source_weights": [0.5, 0.5],
        "sampling": {"max_new_tokens": 32},
    }
    return write_config(folder, **(settings | changes))


class ForkedDaemon:
    """One daemon process; see the module.

    Args:
        config: its config file.
        settings: called in the new process before anything else.
    """

    def __init__(self, config: Path, settings: Callable[[], None] = short_cycle) -> None:
        self.folder = config.parent
        self.socket = config.parent / "sock"
        reader, self._word = os.pipe()
        ready, told = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            status = 70
            try:
                os.close(self._word)
                os.close(ready)
                status = _child(config, settings, reader, told)
            finally:
                os._exit(status)
        os.close(reader)
        os.close(told)
        self.disk_thread = int(os.read(ready, 20) or 0)
        """Of the daemon: the one that all of the state's files are written by."""
        os.close(ready)
        self._status: int | None = None

    def go(self) -> None:
        """Let it begin."""
        os.write(self._word, b"g")

    def poll(self) -> int | None:
        """Its exit status as of ``subprocess`` (negative: a signal), or ``None`` while it runs."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._status = os.waitstatus_to_exitcode(status)
        return self._status

    def wait(self, deadline_s: float = 40.0) -> int:
        end = time.monotonic() + deadline_s
        while (status := self.poll()) is None:
            must(time.monotonic() < end, f"the daemon did not end within {deadline_s:g} s")
            time.sleep(0.002)
        return status

    def signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.wait()

    def close(self) -> None:
        """Kill it if it runs, and let go of it."""
        self.kill()
        with contextlib.suppress(OSError):
            os.close(self._word)

    def connect(self) -> Talk | None:
        """A client, once it listens; ``None`` if it ended before."""
        end = time.monotonic() + START_DEADLINE_S
        while self.poll() is None:
            with contextlib.suppress(OSError):
                return Talk(self.socket)
            must(time.monotonic() < end, f"the daemon does not listen: {self.stderr[-2000:]}")
            time.sleep(0.002)
        return None

    @property
    def stderr(self) -> str:
        return (self.folder / "stderr").read_text(errors="replace")


def _child(config: Path, settings: Callable[[], None], reader: int, told: int) -> int:
    import anyio

    from orchestrator.cli.run import leaves
    from orchestrator.config import load_config
    from orchestrator.daemon.daemon import Daemon
    from orchestrator.logs import configure_logging

    errors = os.open(config.parent / "stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(errors, 1)
    os.dup2(errors, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    settings()
    executor = ThreadPoolExecutor(1)
    os.write(told, b"%d" % executor.submit(threading.get_native_id).result())
    os.close(told)
    os.read(reader, 1)
    loaded = load_config(config)
    logs = configure_logging(file=loaded.logging.file, level=loaded.logging.level)

    async def main() -> None:
        import asyncio

        asyncio.get_running_loop().set_default_executor(executor)
        await Daemon(loaded, logs).run()

    try:
        anyio.run(main, backend="asyncio", backend_options={"use_uvloop": True})
    except BaseExceptionGroup as group:
        print("\n".join(map(repr, leaves(group))), file=sys.stderr)
        return 1
    except Exception as error:  # noqa: BLE001
        print(repr(error), file=sys.stderr)
        return 1
    finally:
        logs.close()
        sys.stderr.flush()
    return 0


def imported() -> None:
    """Import in this process what the daemon needs, so that its forks do not."""
    import anyio._backends._asyncio
    import uvloop

    import orchestrator.cli.run
    import orchestrator.config
    import orchestrator.daemon.daemon
    import orchestrator.engines.scripted
    import orchestrator.logs  # noqa: F401

    assert uvloop
    assert anyio._backends._asyncio


# -- strace ------------------------------------------------------------------------------------------------------------


class Tracer:
    """``strace``, attached to a process and all its threads to come, or to one thread.

    Args:
        pid: of the process, or of the thread.
        expressions: what ``-e`` is to say.
        output: where the trace goes.
        follow: whether threads to come are traced too.
    """

    def __init__(self, pid: int, *expressions: str, output: Path = Path("/dev/null"), follow: bool = True) -> None:
        arguments = [argument for expression in expressions for argument in ("-e", expression)]
        self._process = subprocess.Popen(
            ["strace", *(["-f"] * follow), "-p", str(pid), "-o", str(output), *arguments],
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stderr is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stderr, selectors.EVENT_READ)
            line = self._process.stderr.readline() if selector.select(20) else ""
        if "attached" not in line:
            self.close()
            raise SystemExit(f"strace cannot attach: {line.strip() or 'no answer'}; this script needs ptrace")

    def close(self) -> None:
        """End it; the process goes on."""
        if self._process.poll() is None:
            self._process.terminate()
        self._process.wait(20)
        assert self._process.stderr is not None
        self._process.stderr.close()


@contextlib.contextmanager
def scratch(keep: Path | None, name: str) -> Iterator[Path]:
    """A folder that is removed unless what happens in it fails."""
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=keep))
    try:
        yield folder
    except BaseException:
        print(f"what is left is in {folder}", file=sys.stderr)
        raise
    shutil.rmtree(folder)
