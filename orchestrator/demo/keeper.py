"""A process that is kept running: killed, it is started again.

Invariants:

* Only a process that a signal ended is started again. One that ended by itself has finished, or has said why not.
* Whatever happens, the process is ended and waited for when its ``with`` block is left.
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
"""Somebody who kills processes to see what happens does it less often."""

LAST_LINES: Final = 12


class DemoFailed(OrchestratorError, RuntimeError):
    """A process of the demo ended, or does not start; the message has its last words."""

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
                start_new_session=True,  # an interrupt from the keyboard is ours to pass on, in order
            )

    @property
    def pid(self) -> int:
        """Of the process as it runs now."""
        assert self._process is not None, "it was started"
        return self._process.pid

    def has_finished(self, wait_s: float = 0.0) -> bool:
        """Whether it ended well; waits up to ``wait_s`` for that. Started again if a signal ended it.

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
            raise DemoFailed(f"the {self.name} ended with exit code {code}:\n{self.last_words()}")
        self.restarts += 1
        self._start()
        return False

    def stop(self) -> None:
        """SIGTERM, and SIGKILL for one that does not end by it."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def last_words(self) -> str:
        """The newest lines of its output."""
        if not self._output.exists():
            return ""
        return "\n".join(self._output.read_text(errors="replace").splitlines()[-LAST_LINES:])
