"""The daemon's side of the process of a service: start it, ask it, kill it.

Invariants:

* A process leads its own group; killing it kills what it started, and a Ctrl-C in the terminal does not reach it.
* After any failure the process is of no use any more and has to be killed; only an answer keeps it.
* Whoever starts a process kills it, also when cancelled; killing is bounded by ``KILL_TIMEOUT_S``.

Why not ``anyio.to_process``: there a program that the function starts inherits the very pipe on which answers come
back, so that one line printed by it breaks the call; what it starts outlives a kill; exceptions are unpickled, which
imports user code, in the daemon; and the time of an import cannot be told from the time of the call.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final, Self

import anyio
import orjson
from anyio.abc import ByteReceiveStream, ByteSendStream, Process
from anyio.streams.buffered import BufferedByteReceiveStream

from .messages import MAX_ANSWER_BYTES, PREFIX, ProcessFailed, ProcessTimeout, ServiceRefused, encode_message

__all__ = ["ServiceProcess"]

START_TIMEOUT_S: Final = 120.0
"""For the interpreter and the imports of the user's module: some import whole frameworks, from cold disks."""

KILL_TIMEOUT_S: Final = 5.0
"""A killed process is gone in milliseconds, unless the kernel holds it in a system call on a dead disk."""


class ServiceProcess:
    """One process that serves one service; made by :meth:`start`."""

    def __init__(self, process: Process) -> None:
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("the process of a service needs pipes")
        self._process = process
        self._killed = False
        self._calls: ByteSendStream = process.stdin
        self._answers: ByteReceiveStream = process.stdout
        self._buffered = BufferedByteReceiveStream(process.stdout)

    @classmethod
    async def start(cls, *, service: str, options: dict[str, Any], environment: Mapping[str, str]) -> Self:
        """Start a process and wait until it is ready.

        Args:
            service: see the package's ``__init__``.
            options: given to the service.
            environment: variables that the process has beside the daemon's own.

        Raises:
            ServiceRefused: the service cannot serve that.
            ProcessTimeout: it was not ready within ``START_TIMEOUT_S``.
            ProcessFailed: it did not start.
        """
        with anyio.CancelScope(shield=True):  # milliseconds; a process without an owner would be left otherwise
            try:
                process = await anyio.open_process(
                    [sys.executable, "-m", "orchestrator.concurrency.processes.child"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=None,
                    env={**os.environ, **environment},
                    start_new_session=True,
                )
            except OSError as error:  # too many processes or open files: data, not the end of the daemon
                raise ProcessFailed(f"cannot start its worker process: {error}") from error
        started = cls(process)
        ready = False
        try:
            with anyio.move_on_after(START_TIMEOUT_S):
                setup = {"sys_path": sys.path, "service": service, "options": options}
                answer = await started.call(encode_message(setup))
                if "error" in answer:
                    raise ServiceRefused(answer["error"])
                ready = True
                return started
        finally:
            if not ready:
                await started.kill()
        raise ProcessTimeout(f"its worker process was not ready within {START_TIMEOUT_S:g} s")

    @property
    def is_alive(self) -> bool:
        """Whether the process has not been seen to end."""
        return self._process.returncode is None

    async def call(self, message: bytes) -> dict[str, Any]:
        """Send one message and wait for the answer; the caller holds the deadline.

        Raises:
            ProcessFailed: the process ended, or what it sent is not an answer.
        """
        try:
            await self._calls.send(message)
            header_bytes, data_bytes = PREFIX.unpack(await self._buffered.receive_exactly(PREFIX.size))
            if data_bytes or header_bytes > MAX_ANSWER_BYTES:
                raise ProcessFailed(NOT_AN_ANSWER)
            answer: dict[str, Any] = orjson.loads(await self._buffered.receive_exactly(header_bytes))
        except (OSError, anyio.BrokenResourceError, anyio.ClosedResourceError) as error:
            raise ProcessFailed(await self._ending()) from error
        except (anyio.EndOfStream, anyio.IncompleteRead) as error:
            raise ProcessFailed(await self._ending()) from error
        except orjson.JSONDecodeError as error:
            raise ProcessFailed(NOT_AN_ANSWER) from error
        return answer

    async def kill(self) -> None:
        """End the process and all that it started, at once; also when cancelled. Twice is fine."""
        if not self._killed:
            self._killed = True  # once only: some time after its end the number may belong to somebody else
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        with anyio.move_on_after(KILL_TIMEOUT_S, shield=True):
            await self._process.aclose()

    async def _ending(self) -> str:
        """In words, how the process ended."""
        with anyio.move_on_after(KILL_TIMEOUT_S):
            await self._process.wait()
        code = self._process.returncode
        if code is None:
            how = "closed its pipes"
        elif code < 0:
            how = f"was killed by signal {-code} ({signal.strsignal(-code)})"
        else:
            how = f"exited with code {code}"
        return f"its worker process {how} before it answered"


NOT_AN_ANSWER: Final = "its worker process sent something that is not an answer"
