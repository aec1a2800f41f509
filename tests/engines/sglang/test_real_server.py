"""Our adapter and the pool against a real SGLang server on the CPU; ``scripts/test-sglang`` runs it."""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import anyio
import pytest

from orchestrator.engines import EnginePool, SamplingParams
from orchestrator.engines.embedded.tiny_model import END
from orchestrator.engines.sglang.engine import SGLangEngine
from orchestrator.records import Sample, SampleStatus
from tests.support.daemon_process import daemon, write_config, write_prompts
from tests.support.engine_pools import ask, request, running_pool
from tests.support.real_sglang import CONTEXT_TOKENS, HOME, RealSGLang, Router
from tests.support.turning import turned

pytestmark = [
    pytest.mark.skipif(HOME is None, reason="scripts/test-sglang runs it"),
    pytest.mark.timeout(900),
]

DEADLINE_S = 600.0
"""Only a test that hangs meets it; a tiny model gives some hundred tokens a second on a busy machine."""

PROMPT = list(b"Once upon a time")
GREEDY = SamplingParams(max_new_tokens=200, temperature=0.0)


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def servers() -> Iterator[list[RealSGLang]]:
    """Two servers on the same model, started side by side."""
    started = [RealSGLang().start() for _ in range(2)]
    try:
        yield [server.ready() for server in started]
    finally:
        for server in started:
            server.kill()


@pytest.fixture(scope="module")
def url(servers: list[RealSGLang]) -> str:
    return servers[0].url


@pytest.fixture
async def engine(url: str) -> AsyncIterator[SGLangEngine]:
    made = SGLangEngine(name="real", url=url)
    yield made
    await made.aclose()


async def post(url: str, path: str, body: Any) -> tuple[int, Any]:
    """Straight to the server, by nothing of ours."""
    async with aiohttp.ClientSession() as session, session.post(url + path, json=body) as answer:
        text = await answer.text()
        return answer.status, json.loads(text) if text[:1] in ("{", "[") else text


def prompts(count: int) -> list[list[int]]:
    return [list(f"prompt number {number}:".encode()) for number in range(count)]


async def generated(pool: EnginePool, prompt: Sequence[int], index: int, sampling: SamplingParams) -> Sample:
    sample = Sample(index=index)
    await pool.generate(sample, prompt, sampling)
    return sample


async def all_of(pool: EnginePool, asked: Sequence[Sequence[int]], sampling: SamplingParams) -> list[Sample]:
    samples = [Sample(index=index) for index in range(len(asked))]
    with anyio.fail_after(DEADLINE_S):
        async with anyio.create_task_group() as tasks:
            for sample, prompt in zip(samples, asked, strict=True):
                tasks.start_soon(pool.generate, sample, prompt, sampling)
    return samples


# -- interruptions ----------------------------------------------------------------------------------------------------


async def test_five_hundred_cuts_lose_no_token_and_add_none(engine: SGLangEngine) -> None:
    """Greedy responses that were cut again and again are those that were not."""
    asked = prompts(24)
    async with running_pool(engine) as pool:
        whole = await all_of(pool, asked, GREEDY)
        cuts, rng = 0, random.Random(5)
        while cuts < 500:
            samples = [Sample(index=index) for index in range(len(asked))]
            with anyio.fail_after(DEADLINE_S):
                async with anyio.create_task_group() as tasks:
                    for sample, prompt in zip(samples, asked, strict=True):
                        tasks.start_soon(pool.generate, sample, prompt, GREEDY)
                    await turned(lambda: pool.in_flight)
                    while pool.in_flight and cuts < 500:
                        await anyio.sleep(rng.uniform(0.0, 0.2))  # where a cut falls is drawn, not waited for
                        cuts += pool.interrupt()
            for sample, expected in zip(samples, whole, strict=True):
                assert (sample.tokens, sample.status) == (expected.tokens, expected.status)
                assert sample.logprobs is not None
                assert len(sample.logprobs) == len(sample.tokens)
    assert cuts >= 500


async def test_a_response_that_ends_while_it_is_aborted_has_ended(engine: SGLangEngine, url: str) -> None:
    """Whatever the last event says: the end is known by its tokens, and nothing is generated past it."""
    whole = await ask(engine, request(PROMPT, n=400, temperature=0.0))
    assert whole.tokens[-1] == END
    async with running_pool(engine) as pool:
        for attempt in range(40):
            sample = Sample(index=attempt)

            async def cut(sample: Sample = sample, before_end: int = attempt % 4) -> None:
                await turned(lambda: len(sample.tokens) >= len(whole.tokens) - before_end)
                pool.interrupt()

            with anyio.fail_after(DEADLINE_S):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(cut)
                    await pool.generate(sample, PROMPT, SamplingParams(max_new_tokens=400, temperature=0.0))
                    tasks.cancel_scope.cancel()
            assert list(sample.tokens) == whole.tokens
            assert sample.status is SampleStatus.COMPLETED


# -- the edge of the context ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("short_by", range(1, 10))
async def test_a_response_that_goes_on_at_the_edge_of_the_context_is_truncated(
    engine: SGLangEngine, short_by: int
) -> None:
    """The server refuses inputs of ``context - 6`` tokens and more; a response that is that long has no room left."""
    so_far = Sample(index=1)
    length = CONTEXT_TOKENS - short_by - len(PROMPT)
    so_far.extend([ord("x")] * length, [-1.0] * length, 0)
    async with running_pool(engine) as pool:
        with anyio.fail_after(DEADLINE_S):
            await pool.generate(so_far, PROMPT, SamplingParams(max_new_tokens=CONTEXT_TOKENS, temperature=0.0))
    assert so_far.status in (SampleStatus.TRUNCATED, SampleStatus.COMPLETED)
    assert len(PROMPT) + len(so_far.tokens) <= CONTEXT_TOKENS


# -- pauses and parameters --------------------------------------------------------------------------------------------


@asynccontextmanager
async def paused_by_its_trainer(url: str) -> AsyncIterator[None]:
    status, _ = await post(url, "/pause_generation", {"mode": "in_place"})
    assert status == 200
    try:
        yield
    finally:
        assert (await post(url, "/continue_generation", {}))[0] == 200


async def test_a_server_that_its_trainer_pauses_stays_up(engine: SGLangEngine, url: str) -> None:
    """``/health`` generates a token, and so waits in a pause; a probe must not."""
    async with running_pool(engine) as pool:
        async with paused_by_its_trainer(url):
            with anyio.fail_after(10):
                for _ in range(3):
                    assert (await engine.probe()).context_tokens == CONTEXT_TOKENS
        sample = await generated(pool, PROMPT, 0, GREEDY)
        assert sample.status is not SampleStatus.FAILED


# -- routers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", ["sglang-router", "smg"])
def test_a_daemon_gets_batches_through_a_router(servers: list[RealSGLang], program: str, tmp_path: Path) -> None:
    """With a tokenizer of its own: routers cannot tokenise without being told the model."""
    router = Router(program, [server.url for server in servers]).start()
    try:
        router.ready()
        write_prompts(tmp_path / "easy.jsonl", 40)
        config = write_config(
            tmp_path,
            engines=[{"kind": "sglang", "url": router.url, "max_in_flight": 16}],
            tokenizer={"path": RealSGLang.model_path("first")},
            sampling={"max_new_tokens": 24},
        )
        with daemon(config) as process, process.connect() as client:
            for step in range(4):
                batch = client.get_batch(timeout_s=300)
                assert batch.step == step
                client.set_policy_version(step + 1, mode="abort")
                client.ack(batch.lease)
            assert process.stop() == 0
    finally:
        router.kill()


# -- kills ------------------------------------------------------------------------------------------------------------


def test_a_server_that_is_killed_loses_nothing_and_is_used_again(servers: list[RealSGLang], tmp_path: Path) -> None:
    write_prompts(tmp_path / "easy.jsonl", 60)
    engines = [{"kind": "sglang", "url": server.url, "max_in_flight": 16} for server in servers]
    config = write_config(tmp_path, engines=engines, sampling={"max_new_tokens": 64, "temperature": 1.0})
    with daemon(config) as process, process.connect() as client:
        first = client.get_batch(timeout_s=300)
        servers[1].kill()
        client.ack(first.lease)
        for _ in range(3):
            client.ack(client.get_batch(timeout_s=300).lease)
        servers[1].start().ready()

        def both_up() -> bool:
            return all(engine["state"] == "up" for engine in client.status()["engines"])

        for _ in range(600):
            if both_up():
                break
            client.ack(client.get_batch(timeout_s=300).lease)
        assert both_up()
        status = client.status()
        assert sum(source["groups"]["dropped"] for source in status["sources"].values()) == 0
        assert process.stop() == 0
