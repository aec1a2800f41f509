"""A process that is kept running: if it is killed, it is restarted.

Invariants:

* Only a process that a signal ended is restarted. One that exited by itself has finished, or has reported an error.
* Whatever happens, the process is stopped and waited for when its ``with`` block is left.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from orchestrator.errors import OrchestratorError

__all__ = ["DemoFailed", "Keeper"]

STOP_DEADLINE_S: Final = 30.0

MOST_RESTARTS: Final = 20
"""More than anybody who kills processes to see what happens."""

LAST_LINES: Final = 12


class DemoFailed(OrchestratorError, RuntimeError):
    """A process of the demo ended or did not start; the message quotes its last output."""

    code = "demo_failed"


class Keeper:
    """One process.

    Args:
        name: for messages.
        command: program and arguments.
        output: file that standard output and error are appended to.
        environment: laid over that of this process.
        directory: to run in.
    """

    def __init__(
        self, name: str, command: Sequence[str], output: Path, *, environment: Mapping[str, str], directory: Path
    ) -> None:
        self.name = name
        self.restarts = 0
        self._command = command
        self._output = output
        self._environment = environment
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self._start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def _start(self) -> None:
        with self._output.open("ab") as output:
            self._process = subprocess.Popen(  # noqa: S603 - our own command
                self._command,
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                cwd=self._directory,
                env={**os.environ, **self._environment},
                start_new_session=True,  # an interrupt from the keyboard reaches only us: we stop them in order
            )

    @property
    def pid(self) -> int:
        """The pid of the current process."""
        assert self._process is not None, "it was started"
        return self._process.pid

    def has_finished(self, wait_s: float = 0.0) -> bool:
        """Whether it exited successfully; waits up to ``wait_s`` for that. Restarts it if a signal ended it.

        Raises:
            DemoFailed: it ended with a failure, or was killed too often.
        """
        assert self._process is not None, "it was started"
        try:
            code = self._process.wait(wait_s)
        except subprocess.TimeoutExpired:
            return False
        if code == 0:
            return True
        if code > 0 or self.restarts == MOST_RESTARTS:
            raise DemoFailed(f"the {self.name} exited with code {code}:\n{self.last_lines()}")
        self.restarts += 1
        self._start()
        return False

    def stop(self) -> None:
        """Send SIGTERM, then SIGKILL if that does not end it in time."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def last_lines(self) -> str:
        """The last lines of its output."""
        if not self._output.exists():
            return ""
        return "\n".join(self._output.read_text(errors="replace").splitlines()[-LAST_LINES:])
