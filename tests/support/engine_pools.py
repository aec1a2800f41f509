"""Engines and pools for tests: what a request gives, and a pool that runs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio
import structlog

from orchestrator.engines import Engine, EnginePool, GenerationEnd, GenerationRequest, PoolSettings, SamplingParams

DEADLINE_S = 30.0
"""Only a test that hangs meets it."""


@dataclass
class Got:
    """What an engine handed over, and how it ended (``None``: it raised or was cancelled)."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    end: GenerationEnd | None = None

    def sink(self, tokens: Sequence[int], logprobs: Sequence[float] | None, text: str) -> None:
        self.tokens += tokens
        if tokens:
            assert logprobs is not None
            assert len(logprobs) == len(tokens)
            self.logprobs += logprobs
        self.text += text


def request(
    prompt: Sequence[int],
    *,
    generated: Sequence[int] = (),
    n: int = 16,
    seed: int | None = 0,
    index: int = 0,
    attempt: int = 0,
    **sampling: Any,
) -> GenerationRequest:
    sampling.setdefault("max_new_tokens", len(generated) + n)
    return GenerationRequest(
        request_id=f"{index}-{len(generated)}-{attempt}",
        tokens=[*prompt, *generated],
        max_new_tokens=n,
        sampling=SamplingParams(**sampling),
        seed=seed,
        generated=len(generated),
        sample_index=index,
        attempt=attempt,
    )


async def ask(engine: Engine, asked: GenerationRequest) -> Got:
    got = Got()
    with anyio.fail_after(DEADLINE_S):
        got.end = await engine.generate(asked, got.sink)
    return got


@asynccontextmanager
async def running_engine(engine: Engine) -> AsyncIterator[Engine]:
    """Its ``run`` for as long as the body."""
    async with anyio.create_task_group() as tasks:
        with anyio.fail_after(DEADLINE_S):
            await tasks.start(engine.run)
        try:
            yield engine
        finally:
            await engine.aclose()
            tasks.cancel_scope.cancel()


def pool_of(*engines: Engine, **options: Any) -> EnginePool:
    """Options of the pool and of its settings side by side; what is not given is patient and keeps everything."""
    settings = PoolSettings(
        request_timeout_s=options.pop("request_timeout_s", DEADLINE_S),
        stall_s=options.pop("stall_s", DEADLINE_S),
        max_retries=options.pop("max_retries", 3),
        chunk_tokens=options.pop("chunk_tokens", None),
        keep_partials=options.pop("keep_partials", True),
        seed=options.pop("seed", 0),
    )
    defaults: dict[str, Any] = {"policy_version": lambda: 0, "log": structlog.get_logger()}
    return EnginePool(engines, settings=settings, **defaults | options)


@asynccontextmanager
async def running_pool(*engines: Engine, **settings: Any) -> AsyncIterator[EnginePool]:
    """A pool whose engines have been probed once."""
    pool = pool_of(*engines, **settings)
    async with anyio.create_task_group() as tasks:
        with anyio.fail_after(DEADLINE_S):
            await tasks.start(pool.run)
        yield pool
        tasks.cancel_scope.cancel()
