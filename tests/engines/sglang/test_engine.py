"""The SGLang adapter against a fake of its server over real sockets, and through the pool."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

from orchestrator.engines import EnginePool, SamplingParams
from orchestrator.engines.sglang import abort as sglang_abort
from orchestrator.engines.sglang import engine as sglang_module
from orchestrator.engines.sglang.engine import SGLangEngine
from orchestrator.engines.sglang.stream import Event, Received
from orchestrator.errors import EngineError, EngineRejected, EngineStalled, EngineUnavailable, GenerationFailed
from orchestrator.records import Sample, SampleStatus
from tests.support.engine_pools import DEADLINE_S, Got, ask, request, running_pool
from tests.support.fake_server import until
from tests.support.fake_sglang import FakeSGLang, fake_sglang
from tests.support.http_faults import SILENCE, answer, fault_server

PROMPT = list(b"Once upon a time")
LONG = 300
"""More tokens than any response of the fake has."""


@asynccontextmanager
async def engine_on(
    *, name: str = "sg", logprobs: Any = "temperature", **how: Any
) -> AsyncIterator[tuple[SGLangEngine, FakeSGLang]]:
    async with fake_sglang(**how) as server:
        engine = SGLangEngine(name=name, url=server.url, logprobs=logprobs)
        try:
            yield engine, server
        finally:
            server.released.set()
            await engine.aclose()


@pytest.fixture(params=["cumulative", "incremental"])
async def pair(request: pytest.FixtureRequest) -> AsyncIterator[tuple[SGLangEngine, FakeSGLang]]:
    async with engine_on(incremental=request.param == "incremental") as made:
        yield made


def expected(server: FakeSGLang, prompt: Sequence[int], index: int, **sampling: Any) -> tuple[list[int], list[float]]:
    return server.script.expected_response(prompt, SamplingParams(max_new_tokens=LONG, **sampling), index)


# -- how a response comes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 3, 1000])
async def test_a_response_is_handed_over_token_by_token(pair: tuple[SGLangEngine, FakeSGLang], chunk: int) -> None:
    engine, server = pair
    server.chunk = chunk
    for seed in range(5):
        got = await ask(engine, request(PROMPT, n=LONG, seed=seed))
        tokens, logprobs = expected(server, PROMPT, seed)
        assert (got.tokens, got.logprobs) == (tokens, logprobs)
        assert tokens[-1] == 256
        assert got.text == bytes(tokens[:-1]).decode()
        assert got.end is not None
        assert (got.end.reason, got.end.text_complete) == ("stop", True)
    assert server.aborts == []


async def test_a_response_is_truncated(pair: tuple[SGLangEngine, FakeSGLang]) -> None:
    engine, server = pair
    got = await ask(engine, request(PROMPT, n=7, seed=1))
    tokens, logprobs = expected(server, PROMPT, 1)
    assert (got.tokens, got.logprobs) == (tokens[:7], logprobs[:7])
    assert got.end is not None
    assert got.end.reason == "length"


async def test_a_stop_text_ends_a_response_and_is_no_text_of_it(pair: tuple[SGLangEngine, FakeSGLang]) -> None:
    engine, server = pair
    free, _ = expected(server, PROMPT, 3)
    stop = bytes(free[10:13]).decode()
    tokens, logprobs = expected(server, PROMPT, 3, stop=(stop,))
    got = await ask(engine, request(PROMPT, n=LONG, seed=3, stop=(stop,)))
    assert (got.tokens, got.logprobs) == (tokens, logprobs)
    assert got.end is not None
    assert got.end.reason == "stop"
    assert not got.end.text_complete, "the beginning of the stop text may have been streamed"
    whole = bytes(tokens).decode()
    assert got.text.startswith(whole[: whole.index(stop)])


async def test_a_stop_token_ends_a_response_and_belongs_to_it(pair: tuple[SGLangEngine, FakeSGLang]) -> None:
    engine, server = pair
    tokens, logprobs = expected(server, PROMPT, 2, stop_token_ids=(ord("e"),))
    got = await ask(engine, request(PROMPT, n=LONG, seed=2, stop_token_ids=(ord("e"),)))
    assert (got.tokens, got.logprobs) == (tokens, logprobs)
    assert got.tokens[-1] == ord("e")


async def test_a_response_goes_on_from_its_tokens(pair: tuple[SGLangEngine, FakeSGLang]) -> None:
    engine, server = pair
    tokens, logprobs = expected(server, PROMPT, 4)
    begun = await ask(engine, request(PROMPT, n=8, seed=4))
    rest = await ask(engine, request(PROMPT, generated=begun.tokens, n=LONG, seed=99))
    assert begun.tokens + rest.tokens == tokens
    assert begun.logprobs + rest.logprobs == logprobs
    assert server.requests[1]["input_ids"] == PROMPT + tokens[:8]


async def test_a_request_says_everything_that_shapes_the_draw() -> None:
    engine = SGLangEngine(name="sg", url="http://127.0.0.1:1")
    body = engine.body(request([1, 2], n=5, seed=(1 << 32) - 1, temperature=0.5, top_p=0.9, top_k=3, min_p=0.1), "rid")
    params = body["sampling_params"]
    assert (params["temperature"], params["top_p"], params["top_k"], params["min_p"]) == (0.5, 0.9, 3, 0.1)
    assert params["repetition_penalty"] == 1.0
    assert params["sampling_seed"] < 1 << 31, "seeds of 4 bytes, signed"
    assert (body["return_logprob"], body["stream"], body["rid"]) == (True, True, "rid")
    untruncated = engine.body(request([1], seed=None), "rid")["sampling_params"]
    assert untruncated["top_k"] == -1
    assert "sampling_seed" not in untruncated


async def test_no_more_tokens_are_asked_for_than_fit() -> None:
    async with engine_on(context_tokens=40) as (engine, server):
        await engine.probe()
        got = await ask(engine, request(PROMPT, n=LONG, seed=7))
        assert server.requests[0]["sampling_params"]["max_new_tokens"] == 40 - len(PROMPT)
        assert got.end is not None
        assert len(got.tokens) == 40 - len(PROMPT)
        assert got.end.reason == "length"


@pytest.mark.parametrize("prompt", [[1] * 2000, [*PROMPT, -1], [*PROMPT, 1000]])
async def test_what_the_server_refuses_in_a_stream_is_a_refusal(prompt: list[int]) -> None:
    async with engine_on() as (engine, server):
        with pytest.raises(EngineRejected, match=r"tokens are longer|out of vocabulary"):
            await ask(engine, request(prompt, n=8))
        assert server.aborts == []


# -- cancellation -----------------------------------------------------------------------------------------------------


async def test_a_cancelled_request_is_aborted_by_its_own_id(pair: tuple[SGLangEngine, FakeSGLang]) -> None:
    engine, server = pair
    server.hold_after = 6
    other = Got()

    async def run_other() -> None:
        other.end = await engine.generate(request(PROMPT, n=LONG, seed=1), other.sink)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run_other)
        await until(lambda: len(other.tokens) >= 6)
        got = Got()
        with anyio.CancelScope() as scope:

            def sink(tokens: Sequence[int], logprobs: Sequence[float] | None, text: str) -> None:
                got.sink(tokens, logprobs, text)
                if len(got.tokens) >= 6:
                    scope.cancel()

            await engine.generate(request(PROMPT, n=LONG, seed=2), sink)
        assert scope.cancelled_caught
        assert server.aborts == [{"rid": server.requests[1]["rid"]}]
        assert len(server.running) <= 2
        server.released.set()
    assert got.tokens == expected(server, PROMPT, 2)[0][:6]
    assert other.tokens == expected(server, PROMPT, 1)[0]
    assert other.end is not None
    assert other.end.reason == "stop"


@pytest.mark.parametrize("incremental", [False, True])
async def test_what_was_generated_and_not_sent_yet_comes_with_the_abort(incremental: bool) -> None:
    async with engine_on(incremental=incremental, unsent=40) as (engine, server):
        server.hold_after = 6
        got = Got()
        with anyio.fail_after(DEADLINE_S), anyio.CancelScope() as scope:

            def sink(tokens: Sequence[int], logprobs: Sequence[float] | None, text: str) -> None:
                got.sink(tokens, logprobs, text)
                scope.cancel()

            await engine.generate(request(PROMPT, n=LONG, seed=2), sink)
        tokens, logprobs = expected(server, PROMPT, 2)
    assert scope.cancelled_caught
    assert len(server.aborts) == 1
    assert 40 < len(got.tokens) < len(tokens)
    assert got.tokens == tokens[: len(got.tokens)]
    assert got.logprobs == pytest.approx(logprobs[: len(got.tokens)])


async def test_ids_of_requests_never_begin_each_other() -> None:
    async with engine_on() as (engine, server):
        for seed in range(20):
            await ask(engine, request(PROMPT, n=1, seed=seed))
        rids = [body["rid"] for body in server.requests]
    assert len(set(rids)) == 20
    assert {len(rid) for rid in rids} == {len(rids[0])}
    assert len(rids[0]) >= 32


async def test_a_server_that_does_not_answer_an_abort_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (sglang_module, sglang_abort):
        monkeypatch.setattr(module, "ABORT_DEADLINE_S", 0.05)
    async with fake_sglang(is_deaf=True) as server:
        server.hold_after = 3
        engine = SGLangEngine(name="deaf", url=server.url)
        with anyio.fail_after(DEADLINE_S), anyio.CancelScope() as scope:
            await engine.generate(request(PROMPT, n=LONG), lambda *_: scope.cancel())
        assert scope.cancelled_caught
        assert len(server.aborts) == 1
        server.released.set()
        await engine.aclose()


# -- faults -----------------------------------------------------------------------------------------------------------

BROKEN = [
    "reset",
    "cut",
    "garbage",
    "ends early",
    "miscounts",
    "no count",
    "no log-probability",
    "other reason",
    "abort 503",
]


@pytest.mark.parametrize("fault", BROKEN)
async def test_a_broken_stream_keeps_what_came(pair: tuple[SGLangEngine, FakeSGLang], fault: str) -> None:
    engine, server = pair
    server.faults = [fault]
    got = Got()
    with pytest.raises(EngineUnavailable), anyio.fail_after(DEADLINE_S):
        await engine.generate(request(PROMPT, n=LONG, seed=1), got.sink)
    assert got.tokens == expected(server, PROMPT, 1)[0][: len(got.tokens)]
    assert len(got.tokens) == 6


REFUSED = ["400", "404", "422", "abort 400"]
NOT_NOW = ["204", "429", "500", "503", "abort 503"]


@pytest.mark.parametrize("fault", [*REFUSED, *NOT_NOW])
async def test_an_error_keeps_its_kind_and_the_servers_words(fault: str) -> None:
    kind: type[EngineError] = EngineRejected if fault in REFUSED else EngineUnavailable
    async with engine_on() as (engine, server):
        server.faults = [fault]
        with pytest.raises(kind) as caught:
            await ask(engine, request(PROMPT, n=LONG))
        assert type(caught.value) is kind
        if fault != "204":
            assert "so it was wanted" in caught.value.message
        assert server.aborts == [], "the server itself has ended it"
        assert len(server.requests) == 1, "adapters do not retry"


async def test_what_has_not_begun_to_answer_is_not_waited_for_when_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that moves on because its first token is late would be held up once more."""
    monkeypatch.setattr(sglang_module, "ABORT_DEADLINE_S", 10 * DEADLINE_S)
    async with fault_server(generate=SILENCE, abort_request=answer(b"")) as server:
        engine = SGLangEngine(name="e", url=server.url)
        with anyio.fail_after(DEADLINE_S):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(engine.generate, request(PROMPT), Got().sink)
                await until(lambda: server.count("/generate") == 1)
                tasks.cancel_scope.cancel()
        await engine.aclose()
        assert server.count("/abort_request") == 1


async def test_an_abort_while_it_waited_adds_nothing(pair: tuple[SGLangEngine, FakeSGLang]) -> None:
    engine, server = pair
    server.faults = ["abort in queue"]
    got = await ask(engine, request(PROMPT, n=LONG, seed=1))
    assert got.tokens == expected(server, PROMPT, 1)[0][:6]
    assert got.text == bytes(got.tokens).decode()
    assert got.end is not None
    assert (got.end.reason, got.end.text_complete) == ("abort", False)


async def test_a_server_that_is_gone_is_unavailable() -> None:
    async with engine_on() as (_, server):
        pass
    engine = SGLangEngine(name="gone", url=server.url)
    for call in (engine.probe, lambda: engine.tokenize("x"), lambda: ask(engine, request(PROMPT))):
        with pytest.raises(EngineUnavailable):
            await call()
    await engine.aclose()


# -- what it says of itself -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("old_names", [False, True])
@pytest.mark.parametrize(("weight_version", "version"), [("default", None), ("12", 12), ("-1", None), ("²", None)])
async def test_a_probe_tells_model_context_and_version(
    old_names: bool, weight_version: str, version: int | None
) -> None:
    async with engine_on(old_names=old_names, weight_version=weight_version, logprobs="raw") as (engine, _):
        info = await engine.probe()
    assert (info.model, info.context_tokens, info.policy_version, info.logprobs) == ("fake/model", 1024, version, "raw")


@pytest.mark.parametrize(
    ("sampling", "found"),
    [({}, (256,)), ({"stop": ("e",)}, ()), ({"stop_token_ids": (ord("e"),)}, ()), ({"stop_token_ids": (256,)}, ())],
)
async def test_what_ends_a_sequence_is_learned(sampling: dict[str, Any], found: tuple[int, ...]) -> None:
    async with engine_on() as (engine, _):
        await ask(engine, request(PROMPT, n=3))
        assert (await engine.probe()).end_ids == ()
        await ask(engine, request(PROMPT, n=LONG, **sampling))
        assert (await engine.probe()).end_ids == found


async def test_a_server_that_cannot_tokenise_says_what_to_do() -> None:
    chat = [{"role": "user", "content": "hello"}]
    async with engine_on(has_tokenize=False) as (engine, _):
        with pytest.raises(EngineRejected, match="token ids"):
            await engine.tokenize("x")
        with pytest.raises(EngineRejected, match="chat template"):
            await engine.tokenize_chat(chat, {})
        with pytest.raises(EngineRejected, match="update the server"):
            await engine.detokenize([97])
    async with engine_on(has_chat=False) as (engine, _):
        assert await engine.tokenize("ab") == [97, 98]
        with pytest.raises(EngineRejected, match="chat template"):
            await engine.tokenize_chat(chat, {})


# -- through the pool -------------------------------------------------------------------------------------------------


async def finish(
    pool: EnginePool, samples: Sequence[Sample], prompts: Sequence[list[int]], sampling: SamplingParams
) -> None:
    with anyio.fail_after(DEADLINE_S):
        async with anyio.create_task_group() as tasks:
            for sample, prompt in zip(samples, prompts, strict=True):
                tasks.start_soon(pool.generate, sample, prompt, sampling)


SAMPLING = SamplingParams(max_new_tokens=LONG)
PROMPTS = [list(f"prompt {i}:".encode()) for i in range(6)]


def assert_as_expected(server: FakeSGLang, samples: Sequence[Sample]) -> None:
    for sample, prompt in zip(samples, PROMPTS, strict=True):
        tokens, logprobs = server.script.expected_response(prompt, SAMPLING, 5)
        assert list(sample.tokens) == tokens
        assert sample.logprobs is not None
        assert list(sample.logprobs) == pytest.approx(logprobs)
        assert sample.text == bytes(tokens[:-1]).decode()
        assert sample.status is SampleStatus.COMPLETED


@pytest.mark.parametrize("incremental", [False, True])
@pytest.mark.parametrize("how", ["interrupt", "abort by the server", "pause"])
async def test_aborted_generations_go_on_to_exactly_the_whole_response(incremental: bool, how: str) -> None:
    async with (
        engine_on(incremental=incremental, index_of=lambda _: 5) as (engine, server),
        running_pool(engine, chunk_tokens=64) as pool,
    ):
        server.hold_after = 9
        samples = [Sample(index=i) for i in range(len(PROMPTS))]

        async def meddle() -> None:
            await until(lambda: all(len(sample.tokens) >= 9 for sample in samples))
            if how == "interrupt":
                assert pool.interrupt() == len(samples)
            elif how == "pause":
                await engine._http.ask_raw("/pause_generation", {"mode": "abort"})
            else:
                await engine._http.ask_raw("/abort_request", {"abort_all": True})
            server.hold_after = None
            if how == "pause":
                await until(lambda: not server.running)
                await engine._http.ask_raw("/continue_generation", {})

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(meddle)
            await finish(pool, samples, PROMPTS, SAMPLING)
        assert_as_expected(server, samples)
        assert all(sample.metadata["pieces"] == 2 for sample in samples)
        if how == "interrupt":
            first = [body["rid"] for body in server.requests[: len(samples)]]
            assert sorted(body["rid"] for body in server.aborts) == sorted(first)


@pytest.mark.parametrize("fault", [*BROKEN, "abort in queue", "503"])
async def test_samples_go_on_after_any_fault(fault: str) -> None:
    async with engine_on(index_of=lambda _: 5) as (engine, server), running_pool(engine) as pool:
        server.faults = [fault] * 2  # a third would take the only engine out of use for a while
        samples = [Sample(index=i) for i in range(len(PROMPTS))]
        await finish(pool, samples, PROMPTS, SAMPLING)
        assert_as_expected(server, samples)


async def test_a_server_that_never_answers_stalls() -> None:
    async with engine_on() as (engine, server), running_pool(engine, stall_s=0.05, max_retries=1) as pool:
        server.faults = ["never answers"] * 2
        with anyio.fail_after(DEADLINE_S), pytest.raises(GenerationFailed) as caught:
            await pool.generate(Sample(index=0), PROMPT, SAMPLING)
        assert isinstance(caught.value.__cause__, EngineStalled)
        assert {body["rid"] for body in server.aborts} == {body["rid"] for body in server.requests}


# -- what of an event is new ------------------------------------------------------------------------------------------


def test_an_event_of_nothing_is_nothing() -> None:
    received = Received()
    assert received.new_tokens(Event().meta_info) == []
    assert received.new_text("", is_cumulative=True) == ""
