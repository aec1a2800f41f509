"""The embedded engine: a llama.cpp server that the daemon starts itself, on a given model or on a tiny random one.

Invariants:

* The server is a child process that ends when this process does (``child``).
* A child that dies is started again on the newest model file, after a wait that grows; meanwhile requests fail at once
  with ``EngineUnavailable``, and the pool keeps their tokens.
* A child that cannot be started at all stops the daemon, with the child's last words.
* Other parameters are another child: it serves before the old one is ended, and if it cannot, the old one goes on.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Literal

import anyio
from anyio.abc import TaskGroup, TaskStatus

from orchestrator.engines.llamacpp.engine import LlamaCppEngine
from orchestrator.engines.port import (
    EngineInfo,
    GenerationEnd,
    GenerationRequest,
    ParameterUpdate,
    SamplingParams,
    TokenSink,
)
from orchestrator.errors import EngineError, EngineRejected, EngineUnavailable
from orchestrator.records import Message

from .child import Child, ModelFile
from .tiny_model import write_tiny_model

__all__ = ["EmbeddedEngine"]

FIRST_RESTART_S: Final = 0.2
MAX_RESTART_S: Final = 10.0


class EmbeddedEngine:
    """See the module's invariants.

    Args:
        name: unique among the engines.
        workdir: where the tiny model is written.
        model: a GGUF file; ``None``: a tiny random model.
        slots: generations at a time.
        context_tokens: prompt and response together, for each slot.
        threads: that the server computes with.
        max_in_flight: requests at a time; ``None``: one a slot.
        logprobs: see :class:`~orchestrator.engines.llamacpp.engine.LlamaCppEngine`.
    """

    def __init__(
        self,
        *,
        name: str,
        workdir: Path,
        model: Path | None = None,
        slots: int = 4,
        context_tokens: int = 2048,
        threads: int = 2,
        max_in_flight: int | None = None,
        logprobs: Literal["temperature", "raw"] = "temperature",
    ) -> None:
        self.name = name
        self.max_in_flight = max_in_flight or slots
        self._workdir = workdir
        self._model = model
        self._arguments = [str(slots), str(context_tokens), str(threads)]
        self._logprobs: Literal["temperature", "raw"] = logprobs
        self._tasks: TaskGroup | None = None
        self._child: Child | None = None
        self._starting = anyio.Lock()
        self._loaded: tuple[ModelFile | None, int] | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the server; ``None`` while there is none."""
        process = self._child.process if self._child is not None else None
        return process.pid if process is not None else None

    @property
    def url(self) -> str | None:
        """Address of the server, for other clients; ``None`` while it does not serve. It changes with every start."""
        return self._child.url if self._child is not None and self._child.server is not None else None

    # -- the child -----------------------------------------------------------------------------------------------------

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """Start the server, and start it again whenever it dies, until cancelled.

        Raises:
            EngineError: the first start fails.
        """
        if importlib.util.find_spec("xllamacpp") is None:
            raise EngineError(
                self.name,
                "it needs the package xllamacpp: pip install 'rollout-orchestrator[demo]', or use another engine kind",
            )
        self._model = self._model or await self._tiny_model()
        failure: EngineError | None = None
        try:
            async with anyio.create_task_group() as self._tasks:
                try:
                    await self._start(self._model)
                except EngineError as error:  # not to be wrapped into a group
                    failure = error
                else:
                    task_status.started()
                    await self._keep_alive()
        finally:
            self._tasks = None
        if failure is not None:
            raise failure

    async def _tiny_model(self) -> Path:
        path = self._workdir / "tiny-random-bytes.gguf"
        temporary = path.with_suffix(".tmp")
        await anyio.to_thread.run_sync(write_tiny_model, temporary)
        await anyio.Path(temporary).replace(path)
        return path

    async def _start(self, model: Path) -> None:
        """Have a child serve a model; the one before, if there is one, is left alone.

        Raises:
            EngineError: it cannot.
        """
        assert self._tasks is not None, "the engine runs"
        child = Child(
            name=self.name,
            model=model,
            arguments=self._arguments,
            max_in_flight=self.max_in_flight,
            logprobs=self._logprobs,
        )
        if self._child is None:
            self._child = child  # seen while it starts, so that it can be ended
        await self._tasks.start(child.run)
        self._child = child

    async def _keep_alive(self) -> None:
        wait = FIRST_RESTART_S
        while True:
            assert self._child is not None, "it was started once"
            await self._child.ended.wait()
            await anyio.sleep(wait)
            async with self._starting:  # an update may just be replacing it
                if not self._child.ended.is_set():
                    continue
                assert self._model is not None, "it was started once"
                try:
                    await self._start(self._model)
                    wait = FIRST_RESTART_S
                except EngineError:
                    wait = min(MAX_RESTART_S, 2 * wait)

    async def update_parameters(self, update: ParameterUpdate) -> None:
        """Start a child on the new file, then end the old one. Both are in memory for a moment.

        Raises:
            EngineRejected: the file cannot be loaded, is the one that is served and was written to, or requests were to
                be kept.
            EngineUnavailable: the engine does not run.
        """
        if update.keeps_requests:
            raise EngineRejected(self.name, "it cannot keep requests during an update: use mode abort or finish")
        if self._tasks is None or self._child is None:
            raise EngineUnavailable(self.name, "it is not running")
        async with self._starting:
            old, model = self._child, Path(update.path)
            file = await ModelFile.at(model)
            if file is not None and file == old.file:
                self._loaded = (file, update.version)  # it serves just this, unchanged
                return
            if file is not None and file.is_same_place(old.file):
                raise EngineRejected(
                    self.name,
                    f"{model} is being served and must not change: write the new parameters to another"
                    " file, or to a temporary file that you then rename to this one",
                )
            try:
                await self._start(model)
            except EngineError as error:
                raise EngineRejected(self.name, error.message.removeprefix(f"engine {self.name}: ")) from error
            self._model, self._loaded = model, (self._child.file, update.version)
            old.stop()
            await old.ended.wait()

    def _running(self) -> LlamaCppEngine:
        server = self._child.server if self._child is not None else None
        if server is None:
            raise EngineUnavailable(self.name, "its server is not running and is being restarted")
        return server

    # -- the port ------------------------------------------------------------------------------------------------------

    async def probe(self) -> EngineInfo:
        """As of the server; a version is of the file that it was loaded from, also after a restart."""
        child, info = self._child, await self._running().probe()
        assert child is not None, "it runs"
        is_loaded = self._loaded is not None and self._loaded[0] == child.file
        return replace(
            info,
            policy_version=self._loaded[1] if self._loaded is not None and is_loaded else None,
            instance=" ".join(map(str, (child.model, *(child.file or ())))),
        )

    def supports(self, sampling: SamplingParams) -> str | None:
        """Why these parameters cannot be used; ``None`` if they can."""
        return LlamaCppEngine(name=self.name, url="", logprobs=self._logprobs).supports(sampling)

    async def tokenize(self, text: str) -> list[int]:
        """As of the server."""
        return await self._running().tokenize(text)

    async def tokenize_chat(self, messages: Sequence[Message], template_kwargs: dict[str, Any]) -> list[int]:
        """As of the server."""
        return await self._running().tokenize_chat(messages, template_kwargs)

    async def detokenize(self, tokens: Sequence[int]) -> str:
        """As of the server."""
        return await self._running().detokenize(tokens)

    async def generate(self, request: GenerationRequest, sink: TokenSink) -> GenerationEnd:
        """As of the server."""
        return await self._running().generate(request, sink)

    async def aclose(self) -> None:
        """Close the connections; :meth:`run` ends the server."""
        if self._child is not None and self._child.server is not None:
            await self._child.server.aclose()
