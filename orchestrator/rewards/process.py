"""The daemon's side of a worker process: start it, ask it, kill it.

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
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Self

import anyio
import orjson
from anyio.abc import ByteReceiveStream, ByteSendStream, Process
from anyio.streams.buffered import BufferedByteReceiveStream

from orchestrator.errors import RewardError, RewardTimeout

from .wire import MAX_ANSWER_BYTES, PREFIX, encode_message

__all__ = ["WorkerProcess"]

START_TIMEOUT_S: Final = 120.0
"""For the interpreter and the imports of the user's module: some import whole frameworks, from cold disks."""

KILL_TIMEOUT_S: Final = 5.0
"""A killed process is gone in milliseconds, unless the kernel holds it in a system call on a dead disk."""


class WorkerProcess:
    """One process that serves one function; made by :meth:`start`."""

    def __init__(self, process: Process, function: str) -> None:
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("a worker process needs pipes")
        self._process = process
        self._function = function
        self._killed = False
        self._calls: ByteSendStream = process.stdin
        self._answers: ByteReceiveStream = process.stdout
        self._buffered = BufferedByteReceiveStream(process.stdout)

    @classmethod
    async def start(cls, *, function: str, directory: Path | None, key: str | None) -> Self:
        """Start a process and wait until it has imported the function.

        Raises:
            RewardError: it did not start, or the function is not to be had in it.
            RewardTimeout: it was not ready within ``START_TIMEOUT_S``.
        """
        with anyio.CancelScope(shield=True):  # milliseconds; a process without an owner would be left otherwise
            process = await anyio.open_process(
                [sys.executable, "-m", "orchestrator.rewards.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=None,
                start_new_session=True,
            )
        worker = cls(process, function)
        setup = {
            "sys_path": sys.path,
            "function": function,
            "directory": None if directory is None else str(directory),
            "key": key,
        }
        ready = False
        try:
            with anyio.move_on_after(START_TIMEOUT_S):
                answer = await worker.call(encode_message(setup))
                if "error" in answer:
                    raise RewardError(f"reward {function}: its worker process cannot import it: {answer['error']}")
                ready = True
                return worker
        finally:
            if not ready:
                await worker.kill()
        raise RewardTimeout(f"reward {function}: its worker process was not ready within {START_TIMEOUT_S:g} s")

    @property
    def is_alive(self) -> bool:
        """Whether the process has not been seen to end."""
        return self._process.returncode is None

    async def call(self, message: bytes) -> dict[str, Any]:
        """Send one message and wait for the answer, which may be an error; the caller holds the deadline.

        Raises:
            RewardError: the process ended, or what it sent is not an answer.
        """
        try:
            await self._calls.send(message)
            header_bytes, data_bytes = PREFIX.unpack(await self._buffered.receive_exactly(PREFIX.size))
            if data_bytes or header_bytes > MAX_ANSWER_BYTES:
                raise RewardError(self._not_an_answer())
            answer: dict[str, Any] = orjson.loads(await self._buffered.receive_exactly(header_bytes))
        except (OSError, anyio.BrokenResourceError, anyio.ClosedResourceError) as error:
            raise RewardError(await self._ending()) from error
        except (anyio.EndOfStream, anyio.IncompleteRead) as error:
            raise RewardError(await self._ending()) from error
        except orjson.JSONDecodeError as error:
            raise RewardError(self._not_an_answer()) from error
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
            how = f"was ended by signal {-code} ({signal.strsignal(-code)})"
        else:
            how = f"exited with code {code}"
        return f"reward {self._function}: its worker process {how} before it answered"

    def _not_an_answer(self) -> str:
        return f"reward {self._function}: something that is no answer came from its worker process"
