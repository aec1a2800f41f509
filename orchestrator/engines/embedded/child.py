"""One life of the embedded engine's server: a child process on one model file.

Invariants:

* The child can be killed at any time. It ends when this process does, however that ends, and with :meth:`Child.run`.
* ``file`` is the very file that it reads: what its path led to when it was started.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from pathlib import Path
from typing import Final, Literal, NamedTuple

import anyio
from anyio.abc import Process, TaskStatus
from anyio.streams.buffered import BufferedByteReceiveStream

from orchestrator.engines.llamacpp.engine import LlamaCppEngine
from orchestrator.errors import EngineError

__all__ = ["Child", "ModelFile"]

START_DEADLINE_S: Final = 120.0
"""A model of several gigabytes is read from disk."""

LAST_WORDS: Final = 20
"""Lines of the child's output that an error shows."""

MAX_ADDRESS_BYTES: Final = 256

SERVER: Final = Path(__file__).with_name("server.py")
"""Run as a file, and with ``-P`` without its folder on the path: importing this package first would take ten times as
long as all the rest of a start, which an update of the parameters waits for."""


class ModelFile(NamedTuple):
    """The file that a path leads to; a new file gets the inode of one that is gone, but not its time."""

    device: int
    inode: int
    modified_ns: int

    @classmethod
    async def at(cls, path: Path) -> ModelFile | None:
        """What is there now; ``None``: nothing that can be seen."""
        try:
            found = await anyio.Path(path).stat()
        except OSError:
            return None
        return cls(found.st_dev, found.st_ino, found.st_mtime_ns)

    def is_same_place(self, other: ModelFile | None) -> bool:
        """Whether writing into one changes the other."""
        return other is not None and self[:2] == other[:2]


class Child:
    """See the module's docstring.

    Args:
        name: of the engine.
        model: GGUF file.
        arguments: slots, context in tokens, threads.
        max_in_flight: requests at a time.
        logprobs: see :class:`~orchestrator.engines.llamacpp.engine.LlamaCppEngine`.
    """

    def __init__(
        self,
        *,
        name: str,
        model: Path,
        arguments: list[str],
        max_in_flight: int,
        logprobs: Literal["temperature", "raw"],
    ) -> None:
        self.name = name
        self.model = model
        self.file: ModelFile | None = None
        self.url: str | None = None
        self.server: LlamaCppEngine | None = None
        self.process: Process | None = None
        self.ended = anyio.Event()
        self._arguments = arguments
        self._max_in_flight = max_in_flight
        self._logprobs: Literal["temperature", "raw"] = logprobs
        self._scope = anyio.CancelScope()
        self._last_words: deque[str] = deque(maxlen=LAST_WORDS)

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """Start the child, call ``started()`` when it serves, return when it has ended.

        Raises:
            EngineError: it did not start; the message has its last words.
        """
        self.file = await ModelFile.at(self.model)
        command = [sys.executable, "-P", str(SERVER), str(self.model), *self._arguments]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        process = self.process = await anyio.open_process(command, env=environment)
        try:
            with self._scope:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(self._listen_to_stderr, process)
                    await self._begin(process)
                    if self.server is not None:
                        task_status.started()
                        await process.wait()
                    tasks.cancel_scope.cancel()
        finally:
            with anyio.CancelScope(shield=True):
                await self._end(process)
        if self.url is None:
            words = "\n".join(self._last_words) or "no output"
            raise EngineError(self.name, f"its server did not start on {self.model}: {words}")

    def stop(self) -> None:
        """End the child; ``ended`` is set when that is done."""
        self._scope.cancel()

    async def _begin(self, process: Process) -> None:
        """Wait for the line that the child prints when it serves."""
        assert process.stdout is not None
        with anyio.move_on_after(START_DEADLINE_S):
            try:
                line = await BufferedByteReceiveStream(process.stdout).receive_until(b"\n", MAX_ADDRESS_BYTES)
            except (anyio.IncompleteRead, anyio.DelimiterNotFound, anyio.EndOfStream):
                return
            self.url = line.decode("ascii", "replace").strip()
            self.server = LlamaCppEngine(
                name=self.name, url=self.url, max_in_flight=self._max_in_flight, logprobs=self._logprobs
            )

    async def _listen_to_stderr(self, process: Process) -> None:
        """Keep the newest lines; without a reader the child would block."""
        assert process.stderr is not None
        rest = ""
        async for part in process.stderr:
            *lines, rest = (rest + part.decode("utf-8", "replace"))[-65536:].split("\n")
            self._last_words.extend(lines)

    async def _end(self, process: Process) -> None:
        server, self.server, self.process = self.server, None, None
        if process.returncode is None:
            process.kill()  # not terminate: its destructor can hang
        await process.wait()
        await process.aclose()
        if server is not None:
            await server.aclose()
        self.ended.set()
