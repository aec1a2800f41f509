"""What tests of engines share: engines that run, requests, what a sink received, a real server."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import anyio
import pytest

from orchestrator.engines.port import Engine, GenerationEnd, GenerationRequest, SamplingParams
from orchestrator.engines.tiny_model import write_tiny_model

E = TypeVar("E", bound=Engine)

CONTEXT_TOKENS = 1024
SLOTS = 4


@asynccontextmanager
async def running(engine: E) -> AsyncIterator[E]:
    """The engine, with its life owned here."""
    async with anyio.create_task_group() as tasks:
        await tasks.start(engine.run)
        try:
            yield engine
        finally:
            await engine.aclose()
            tasks.cancel_scope.cancel()


@dataclass
class Received:
    """A sink that remembers. ``begun`` is set by the first token."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    begun: anyio.Event = field(default_factory=anyio.Event)
    end: GenerationEnd | None = None

    def __call__(self, tokens: Sequence[int], logprobs: Sequence[float] | None, text: str) -> None:
        assert logprobs is not None
        assert len(logprobs) == len(tokens)
        self.tokens += tokens
        self.logprobs += logprobs
        self.text += text
        if tokens:
            self.begun.set()


def request_for(
    tokens: Sequence[int] | str, n: int = 32, *, seed: int = 0, sample_index: int = 0, **sampling: Any
) -> GenerationRequest:
    ids = list(tokens.encode()) if isinstance(tokens, str) else list(tokens)
    params = SamplingParams(max_new_tokens=n, **sampling)
    return GenerationRequest(f"{sample_index}", ids, n, params, seed=seed, sample_index=sample_index)


def continued(request: GenerationRequest, tokens: Sequence[int]) -> GenerationRequest:
    """What is left of a request after so many tokens."""
    return replace(
        request,
        tokens=[*request.tokens, *tokens],
        generated=request.generated + len(tokens),
        max_new_tokens=request.max_new_tokens - len(tokens),
    )


async def generate(engine: Engine, request: GenerationRequest) -> Received:
    received = Received()
    with anyio.fail_after(20):
        received.end = await engine.generate(request, received)
    return received


@contextmanager
def llama_server(model: Path, *, slots: int = SLOTS, context_tokens: int = CONTEXT_TOKENS) -> Iterator[str]:
    """The address of a real server in a process of its own."""
    command = [sys.executable, "-m", "orchestrator.engines.embedded_server", str(model)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    with subprocess.Popen(
        [*command, str(slots), str(context_tokens), "1"],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().decode().strip()
        finally:
            process.kill()


@pytest.fixture(scope="session")
def readable_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server whose model writes printable ASCII."""
    model = tmp_path_factory.mktemp("models") / "readable.gguf"
    write_tiny_model(model)
    with llama_server(model) as url:
        yield url


@pytest.fixture(scope="session")
def byte_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server whose model writes any bytes: half of them begin or continue a character."""
    model = tmp_path_factory.mktemp("models") / "bytes.gguf"
    write_tiny_model(model, ascii_only=False)
    with llama_server(model) as url:
        yield url
