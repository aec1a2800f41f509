"""What wrong answers of a llama.cpp server and its death become; the faults of any wire are in ``test_engine_wire``."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from orchestrator.engines import SamplingParams
from orchestrator.engines.embedded.engine import EmbeddedEngine
from orchestrator.engines.embedded.tiny_model import write_tiny_model
from orchestrator.engines.http import client as http_module
from orchestrator.engines.http.client import EngineHttp
from orchestrator.engines.llamacpp.engine import LlamaCppEngine
from orchestrator.engines.llamacpp.gaps import _at_temperature, missing_tokens
from orchestrator.engines.llamacpp.wire import Chunk
from orchestrator.engines.pool import health as health_module
from orchestrator.errors import EngineError, EngineUnavailable
from orchestrator.records import Sample
from tests.support.engine_pools import DEADLINE_S, Got, ask, request, running_engine, running_pool
from tests.support.http_faults import SILENCE, FaultServer, Reply, answer, end_event, fault_server, stream, token_event

PROMPT = [1, 2, 3]
THREE = [token_event(97, 1), token_event(98, 2), token_event(99, 3)]
WELL_STREAM = stream([*THREE, end_event(3)])


@asynccontextmanager
async def engine_on(*, name: str = "faulty", **replies: Any) -> AsyncIterator[tuple[LlamaCppEngine, FaultServer]]:
    async with fault_server(**replies) as server:
        engine = LlamaCppEngine(name=name, url=server.url)
        try:
            yield engine, server
        finally:
            await engine.aclose()


async def failure_of(engine: LlamaCppEngine, got: Got) -> EngineError:
    with anyio.fail_after(DEADLINE_S), pytest.raises(EngineError) as caught:
        await engine.generate(request(PROMPT), got.sink)
    return caught.value


# -- answers ----------------------------------------------------------------------------------------------------------


STREAM_FAULTS = {
    "tokens of a wrong type": stream([*THREE, {"tokens": "abc", "tokens_predicted": 4}]),
    "tokens beyond all integers": stream([*THREE, {"tokens": [1 << 80], "tokens_predicted": 4}]),
    "a token of more than 4 bytes": stream([*THREE, token_event(100, 4, tokens=[1 << 31])]),
    "a token below 0": stream([*THREE, token_event(100, 4, tokens=[-1])]),
    "no log-probability": stream([*THREE, {"tokens": [100], "tokens_predicted": 4, "content": "d"}]),
    "too many log-probabilities": stream(
        [*THREE, token_event(100, 4, completion_probabilities=[{"id": 100, "logprob": -1.0}] * 2)]
    ),
    "counts backwards": stream([*THREE, token_event(100, 2)]),
}


@pytest.mark.parametrize("name", STREAM_FAULTS)
async def test_a_broken_stream_makes_the_engine_unavailable_and_keeps_what_came(name: str) -> None:
    async with engine_on(completion=STREAM_FAULTS[name]) as (engine, _):
        error = await failure_of(engine, got := Got())
    assert isinstance(error, EngineUnavailable)
    assert got.tokens == [97, 98, 99]
    assert got.logprobs == [-0.5] * 3


async def test_an_answer_that_never_ends_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_module, "MAX_ANSWER_BYTES", 1 << 18)
    async with engine_on(tokenize=Reply(b" " * 65536, then="repeat")) as (engine, _):
        with pytest.raises(EngineUnavailable, match="more than"), anyio.fail_after(DEADLINE_S):
            await engine.tokenize("x")


WRONG_SHAPES = [b"", b"{", b"[]", b"null", b'"x"', b"{}", b'{"tokens": null, "content": null}', b"\xff" * 100]


@pytest.mark.parametrize("body", WRONG_SHAPES)
async def test_answers_of_a_wrong_shape_make_the_engine_unavailable(body: bytes) -> None:
    wrong = answer(body)
    async with engine_on(tokenize=wrong, detokenize=wrong, props=wrong, **{"apply-template": wrong}) as (engine, _):
        for call in (
            lambda: engine.probe(),
            lambda: engine.tokenize("x"),
            lambda: engine.tokenize_chat([{"role": "user", "content": "x"}], {}),
            lambda: engine.detokenize([1]),
        ):
            with pytest.raises(EngineUnavailable), anyio.fail_after(DEADLINE_S):
                await call()


@pytest.mark.parametrize("tokens", ["abc", [1, "2"], [1.5], {"1": 2}, [[1]], [True], [-1], [1 << 31]])
async def test_token_ids_of_a_wrong_type_make_the_engine_unavailable(tokens: Any) -> None:
    async with engine_on(tokenize=answer({"tokens": tokens})) as (engine, _):
        with pytest.raises(EngineUnavailable):
            await engine.tokenize("x")


async def test_another_kind_of_server_is_named_by_the_probe() -> None:
    missing = answer({"detail": "Not Found"}, 404)
    async with engine_on(props=missing) as (engine, _):
        with pytest.raises(EngineUnavailable, match=r"llama\.cpp"):
            await engine.probe()


# -- through the pool -------------------------------------------------------------------------------------------------


def sampling(n: int = 16) -> SamplingParams:
    return SamplingParams(max_new_tokens=n)


async def test_a_server_that_accepts_and_never_answers_stalls_and_the_sample_goes_on_elsewhere() -> None:
    async with (
        engine_on(name="silent", completion=SILENCE) as (silent, server),
        engine_on(name="well", completion=WELL_STREAM) as (well, _),
        running_pool(silent, well, stall_s=0.2) as pool,
    ):
        samples = [Sample(index=i) for i in range(4)]
        with anyio.fail_after(DEADLINE_S):
            async with anyio.create_task_group() as tasks:
                for sample in samples:
                    tasks.start_soon(pool.generate, sample, PROMPT, sampling())
        stalled = {member.name: member.stalled for member in pool.statistics()}
        assert server.count("/completion") >= 1
        assert stalled == {"silent": server.count("/completion"), "well": 0}
    assert all(list(sample.tokens) == [97, 98, 99] for sample in samples)


@pytest.mark.parametrize("name", STREAM_FAULTS)
async def test_a_sample_goes_on_after_a_broken_stream(name: str) -> None:
    rest = stream([token_event(100, 1), end_event(1)])
    async with (
        engine_on(completion=[STREAM_FAULTS[name], rest]) as (engine, server),
        running_pool(engine) as pool,
    ):
        sample = Sample(index=0)
        with anyio.fail_after(DEADLINE_S):
            await pool.generate(sample, PROMPT, sampling())
        assert server.requests[-1][0] != "/completion" or server.requests[-1][1]["prompt"] == [*PROMPT, 97, 98, 99]
    assert list(sample.tokens) == [97, 98, 99, 100]
    assert sample.logprobs is not None
    assert list(sample.logprobs) == [-0.5] * 4


# -- gaps -------------------------------------------------------------------------------------------------------------

TOKENS = st.lists(st.integers(0, 300), max_size=6)


@given(
    known=TOKENS, missing=TOKENS, last=st.lists(st.integers(0, 300), max_size=1), stop=st.sampled_from(["eos", "limit"])
)
@settings(max_examples=25)
async def test_a_repetition_that_agrees_gives_exactly_what_was_left_out(
    known: list[int], missing: list[int], last: list[int], stop: str
) -> None:
    whole = [*known, *missing, *last]
    async with fault_server(completion=answer({"tokens": whole, "stop_type": stop})) as server:
        http = EngineHttp(kind="llama.cpp server", name="x", url=server.url, max_streams=1, connect_timeout_s=5)
        after = Chunk(tokens=last, tokens_predicted=len(whole))
        found = await missing_tokens(http, {"n_predict": 99, "seed": 1}, known, after, deadline_s=DEADLINE_S)
        await http.aclose()
        assert found == (missing, stop)
        assert server.requests[0][1] == {"n_predict": len(whole), "seed": 1, "stream": False}


@given(known=TOKENS, missing=TOKENS, last=st.lists(st.integers(0, 300), max_size=1), data=st.data())
@settings(max_examples=25)
async def test_a_repetition_that_disagrees_with_what_was_streamed_is_not_used(
    known: list[int], missing: list[int], last: list[int], data: st.DataObject
) -> None:
    whole = [*known, *missing, *last]
    certain = [*range(len(known)), *range(len(known) + len(missing), len(whole))]
    told = list(whole)
    if certain and data.draw(st.booleans()):
        told[data.draw(st.sampled_from(certain))] += 1
    elif whole and data.draw(st.booleans()):
        told.pop()
    else:
        told.append(7)
    async with fault_server(completion=answer({"tokens": told, "stop_type": "limit"})) as server:
        http = EngineHttp(kind="llama.cpp server", name="x", url=server.url, max_streams=1, connect_timeout_s=5)
        after = Chunk(tokens=last, tokens_predicted=len(whole))
        with pytest.raises(EngineUnavailable):
            await missing_tokens(http, {}, known, after, deadline_s=DEADLINE_S)
        await http.aclose()


@given(st.lists(st.floats(-60, 0), min_size=1, max_size=20), st.floats(0.05, 5))
def test_log_probabilities_at_another_temperature_are_those_of_the_sharpened_distribution(
    logits: list[float], temperature: float
) -> None:
    norm = math.log(math.fsum(math.exp(logit) for logit in logits))
    raw = {i: logit - norm for i, logit in enumerate(logits)}
    sharp = [_at_temperature(raw, i, temperature) for i in raw]
    assert math.fsum(map(math.exp, sharp)) == pytest.approx(1)
    for i, logit in enumerate(logits):
        assert sharp[i] - sharp[0] == pytest.approx((logit - logits[0]) / temperature, abs=1e-6)


# -- a server of our own that dies ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that never ends a response by itself."""
    path = tmp_path_factory.mktemp("models") / "endless.gguf"
    write_tiny_model(path, mean_tokens=1e12)
    return path


async def test_while_a_killed_server_is_started_again_everything_is_unavailable(tmp_path: Path, endless: Path) -> None:
    engine = EmbeddedEngine(name="e", workdir=tmp_path, model=endless, threads=1)
    async with running_engine(engine):
        first, was_refused = engine.pid, False
        assert first is not None
        os.kill(first, signal.SIGKILL)
        with anyio.fail_after(DEADLINE_S):
            while engine.url is None or engine.pid == first:
                if engine.url is None:
                    for call in (engine.probe(), engine.tokenize("x"), engine.generate(request(PROMPT), Got().sink)):
                        with pytest.raises(EngineUnavailable):
                            await call
                    was_refused = True
                await anyio.sleep(0.005)
        assert was_refused
        assert len((await ask(engine, request(PROMPT, n=8))).tokens) == 8
    assert not Path(f"/proc/{first}").exists(), "collected, no zombie"


async def test_a_sample_is_whole_although_its_server_was_killed(
    tmp_path: Path, endless: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health_module, "DOWN_CHECK_INTERVAL_S", 0.05)
    monkeypatch.setattr(health_module, "HEALTH_CHECK_INTERVAL_S", 0.05)
    engine = EmbeddedEngine(name="e", workdir=tmp_path, model=endless, threads=1)
    sample = Sample(index=0)
    whole = sampling(1200)
    async with running_pool(engine, max_retries=1000) as pool, anyio.create_task_group() as tasks:
        tasks.start_soon(pool.generate, sample, PROMPT, whole)
        with anyio.fail_after(DEADLINE_S):
            while len(sample.tokens) < 100:
                await anyio.lowlevel.checkpoint()
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGKILL)
    assert len(sample.tokens) == 1200
    assert sample.logprobs is not None
    assert len(sample.logprobs) == 1200
    assert sample.text == bytes(list(sample.tokens)).decode()
    assert sample.metadata["pieces"] >= 2


async def test_no_process_is_left_behind_by_a_cancelled_run(tmp_path: Path, endless: Path) -> None:
    engine = EmbeddedEngine(name="e", workdir=tmp_path, model=endless, threads=1)
    async with running_engine(engine):
        pid = engine.pid
        assert Path(f"/proc/{pid}").exists()
    assert not Path(f"/proc/{pid}").exists(), "ended and collected"
    assert (engine.pid, engine.url) == (None, None)


async def test_no_process_is_left_behind_by_a_cancelled_start(tmp_path: Path, endless: Path) -> None:
    engine = EmbeddedEngine(name="e", workdir=tmp_path, model=endless, threads=1)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(tasks.start, engine.run)
        with anyio.fail_after(DEADLINE_S):
            while engine.pid is None:
                await anyio.lowlevel.checkpoint()
        pid = engine.pid
        tasks.cancel_scope.cancel()
    assert not Path(f"/proc/{pid}").exists()
