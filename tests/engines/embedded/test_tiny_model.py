"""The tiny model: the same file each time, and a server that draws from it what its docstring promises."""

from __future__ import annotations

import math
import statistics
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import anyio
import pytest

from orchestrator.engines.embedded.engine import EmbeddedEngine
from orchestrator.engines.embedded.tiny_model import BEGIN, END, PAD, write_tiny_model
from tests.support.engine_pools import ask, request, running_engine

MEAN_TOKENS = 48.0
PRINTABLE = {10, *range(32, 127)}


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EmbeddedEngine]:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_model(folder / "tiny.gguf", mean_tokens=MEAN_TOKENS)
    engine = EmbeddedEngine(
        name="tiny", workdir=folder, model=folder / "tiny.gguf", slots=8, context_tokens=1024, threads=1
    )
    async with running_engine(engine):
        yield engine


def test_the_same_arguments_give_the_same_bytes(tmp_path: Path) -> None:
    for name, how in {
        "a": {},
        "b": {},
        "c": {"seed": 1},
        "d": {"ascii_only": False},
        "e": {"mean_tokens": 9.0},
    }.items():
        write_tiny_model(tmp_path / name, **how)
    a, b, *others = [(tmp_path / name).read_bytes() for name in "abcde"]
    assert a == b
    assert len({a, *others}) == 4
    assert len(a) < 1 << 20


async def test_responses_have_the_promised_length_and_only_printable_bytes(server: EmbeddedEngine) -> None:
    responses: list[list[int]] = []

    async def one(seed: int) -> None:
        responses.append((await ask(server, request(list(b"Say: "), n=900, seed=seed))).tokens)

    for first in range(0, 160, 8):
        async with anyio.create_task_group() as tasks:
            for seed in range(first, first + 8):
                tasks.start_soon(one, seed)
    lengths = [len(tokens) for tokens in responses]
    # Lengths are about geometric: the mean of 160 has a standard deviation of 48 / sqrt(160) = 4.
    assert MEAN_TOKENS / 2 < statistics.mean(lengths) < MEAN_TOKENS * 2
    assert statistics.stdev(lengths) > MEAN_TOKENS / 4, "short and long ones"
    for tokens in responses:
        assert tokens[-1] == END
        assert set(tokens[:-1]) <= PRINTABLE
    said = {token for tokens in responses for token in tokens}
    assert len(said) > 80, "nearly all of them are said"


async def test_the_first_token_is_far_from_certain(server: EmbeddedEngine) -> None:
    assert server.url is not None
    body = {"n_predict": 1, "n_probs": 1000, "samplers": ["temperature"], "temperature": 1.0}
    for prompt in (b"a", b"12+30=", b"Once upon a time"):
        asked = body | {"prompt": list(prompt)}
        async with aiohttp.ClientSession() as session, session.post(server.url + "/completion", json=asked) as answer:
            top = (await answer.json())["completion_probabilities"][0]["top_logprobs"]
        logprobs = {entry["id"]: entry["logprob"] for entry in top}
        assert len(logprobs) == PAD + 1
        assert math.fsum(map(math.exp, logprobs.values())) == pytest.approx(1, abs=1e-4)
        entropy = -math.fsum(math.exp(value) * value for value in logprobs.values())
        assert 0.75 * math.log(96) < entropy < math.log(97)
        assert logprobs[BEGIN] < -30
        assert logprobs[PAD] < -30
        assert 1 / (8 * MEAN_TOKENS) < math.exp(logprobs[END]) < 8 / MEAN_TOKENS


async def test_token_ids_are_bytes(server: EmbeddedEngine) -> None:
    assert await server.tokenize("Größe\n") == list("Größe\n".encode())
    assert BEGIN not in await server.tokenize("")
