"""OpenAI-compatible servers: which dialect one speaks, and the adapter that speaks it.

* ``vllm`` and ``generic``: token ids by ``/v1/completions`` (``tokens``).
* ``llamacpp``: a llama.cpp server by its own ``/completion`` (``llamacpp``): its OpenAI-compatible paths give no token
  ids, and its streams leave tokens out, which that adapter knows how to find.
* ``chat``: texts by ``/v1/chat/completions`` (``chat``). Never found out: samples without token ids can only be
  trained on by tokenising their text again, which gives other tokens than were drawn; somebody has to want that.

Invariants:

* What was found out stays: once a server could be used, its dialect is not asked for again.
* Before that nothing but a probe is sent to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import anyio
import msgspec
from anyio.abc import TaskStatus

from orchestrator.engines.http.client import EngineHttp
from orchestrator.engines.llamacpp.engine import LlamaCppEngine
from orchestrator.engines.llamacpp.wire import Props
from orchestrator.engines.port import Engine, EngineInfo, GenerationEnd, GenerationRequest, ParameterUpdate, TokenSink
from orchestrator.errors import EngineRejected, EngineUnavailable
from orchestrator.records import Message

from .chat import OpenAIChat
from .tokens import OpenAITokens
from .wire import Version

__all__ = ["OpenAIEngine"]

Dialect = Literal["vllm", "generic", "llamacpp", "chat"]


class OpenAIEngine:
    """See the module's docstring.

    Args:
        name: unique among the engines.
        url: ``http://host:port``.
        model: to ask for; ``None``: the first of ``/v1/models``.
        max_in_flight: requests at a time; the server queues what it does not run.
        dialect: see the module's docstring; ``auto``: found out.
        logprobs: ``temperature`` or ``raw``, see ``tokens`` and ``llamacpp``.
        api_key_env: environment variable with the key of the server.
        connect_timeout_s: to connect.
    """

    def __init__(
        self,
        *,
        name: str,
        url: str,
        model: str | None = None,
        max_in_flight: int = 256,
        dialect: Literal["auto", "vllm", "generic", "llamacpp", "chat"] = "auto",
        logprobs: Literal["temperature", "raw"] = "temperature",
        api_key_env: str | None = None,
        connect_timeout_s: float = 5.0,
    ) -> None:
        self.name = name
        self.max_in_flight = max_in_flight
        self._model = model
        self._logprobs: Literal["temperature", "raw"] = logprobs
        self._options: dict[str, Any] = {
            "name": name,
            "url": url,
            "max_in_flight": max_in_flight,
            "api_key_env": api_key_env,
            "connect_timeout_s": connect_timeout_s,
        }
        self._http = EngineHttp(
            name=name,
            url=url,
            kind="OpenAI-compatible server",
            max_streams=0,
            connect_timeout_s=connect_timeout_s,
            api_key_env=api_key_env,
        )
        self._speaker: Engine | None = None if dialect == "auto" else self._speaking(dialect)
        self._finding = anyio.Lock()
        self._is_found = anyio.Event()

    # -- which dialect -------------------------------------------------------------------------------------------------

    def _speaking(self, dialect: Dialect) -> Engine:
        match dialect:
            case "llamacpp":
                return LlamaCppEngine(**self._options, logprobs=self._logprobs)
            case "chat":
                return OpenAIChat(**self._options, model=self._model)
        return OpenAITokens(**self._options, model=self._model, dialect=dialect, logprobs=self._logprobs)

    async def _found(self) -> Engine:
        """The adapter of the server's dialect.

        Raises:
            EngineUnavailable, EngineStalled: the server cannot be used, by any that could be its own.
        """
        async with self._finding:
            if self._speaker is None:
                found = self._speaking(await self._dialect())
                try:
                    await found.probe()
                except BaseException:
                    await found.aclose()
                    raise
                self._speaker = found
                self._is_found.set()
        return self._speaker

    async def _dialect(self) -> Dialect:
        try:
            await self._http.ask_raw("/health")
        except EngineRejected as error:
            raise EngineUnavailable(self.name, f"it cannot be used: {error.message}") from error
        if await self._has("/version", Version):
            return "vllm"
        return "llamacpp" if await self._has("/props", Props) else "generic"

    async def _has(self, path: str, into: Any) -> bool:
        try:
            await self._http.ask(path, into)
        except EngineRejected:
            return False
        except EngineUnavailable as error:
            if "status" in error.data or isinstance(error.__cause__, msgspec.MsgspecError):
                return False
            raise
        return True

    # -- the port, as that adapter does it -----------------------------------------------------------------------------

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """What the adapter of the dialect has to do, from when that is known."""
        if self._speaker is None:
            task_status.started()
            await self._is_found.wait()
        assert self._speaker is not None, "it was found"
        status = anyio.TASK_STATUS_IGNORED if self._is_found.is_set() else task_status
        await self._speaker.run(task_status=status)

    async def probe(self) -> EngineInfo:
        """What the server says of itself; the first time also which dialect it speaks."""
        return await (await self._found()).probe()

    async def tokenize(self, text: str) -> list[int]:
        """See the port."""
        return await (await self._found()).tokenize(text)

    async def tokenize_chat(self, messages: Sequence[Message], template_kwargs: dict[str, Any]) -> list[int]:
        """See the port."""
        return await (await self._found()).tokenize_chat(messages, template_kwargs)

    async def detokenize(self, tokens: Sequence[int]) -> str:
        """See the port."""
        return await (await self._found()).detokenize(tokens)

    async def generate(self, request: GenerationRequest, sink: TokenSink) -> GenerationEnd:
        """See the port."""
        return await (await self._found()).generate(request, sink)

    async def update_parameters(self, update: ParameterUpdate) -> None:
        """See the port."""
        await (await self._found()).update_parameters(update)

    async def aclose(self) -> None:
        """Close all connections."""
        await self._http.aclose()
        if self._speaker is not None:
            await self._speaker.aclose()
