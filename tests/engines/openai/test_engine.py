"""The adapter of OpenAI-compatible servers against a fake vLLM over real sockets, and through the pool."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

from orchestrator.engines import EnginePool, SamplingParams
from orchestrator.engines.openai import vllm_pause
from orchestrator.engines.openai.engine import OpenAIEngine
from orchestrator.engines.openai.tokens import OpenAITokens
from orchestrator.errors import EngineError, EngineRejected, EngineStalled, EngineUnavailable, GenerationFailed
from orchestrator.records import Sample, SampleStatus
from tests.support.engine_pools import DEADLINE_S, Got, ask, request, running_engine, running_pool
from tests.support.fake_openai import FakeOpenAI, fake_openai
from tests.support.fake_server import until

PROMPT = list(b"Once upon a time")
LONG = 300
"""More tokens than any response of the fake has."""


@asynccontextmanager
async def engine_on(
    options: dict[str, Any] | None = None, **how: Any
) -> AsyncIterator[tuple[OpenAIEngine, FakeOpenAI]]:
    async with fake_openai(**how) as server:
        engine = OpenAIEngine(name="oai", url=server.url, **options or {})
        try:
            yield engine, server
        finally:
            server.released.set()
            await engine.aclose()


def expected(server: FakeOpenAI, prompt: Sequence[int], index: int, **sampling: Any) -> tuple[list[int], list[float]]:
    return server.script.expected_response(prompt, SamplingParams(max_new_tokens=LONG, **sampling), index)


# -- how a response comes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 3, 1000])
async def test_a_response_is_handed_over_token_by_token(chunk: int) -> None:
    async with engine_on(chunk=chunk) as (engine, server):
        for seed in range(5):
            got = await ask(engine, request(PROMPT, n=LONG, seed=seed))
            tokens, logprobs = expected(server, PROMPT, seed)
            assert (got.tokens, got.logprobs) == (tokens, logprobs)
            assert tokens[-1] == 256
            assert got.text == bytes(tokens[:-1]).decode()
            assert got.end is not None
            assert (got.end.reason, got.end.text_complete) == ("stop", True)


async def test_a_response_is_truncated() -> None:
    async with engine_on() as (engine, server):
        got = await ask(engine, request(PROMPT, n=7, seed=1))
        assert got.tokens == expected(server, PROMPT, 1)[0][:7]
        assert got.end is not None
        assert got.end.reason == "length"


@pytest.mark.parametrize("chunk", [1, 3])
async def test_a_stop_text_ends_a_response_and_is_no_text_of_it(chunk: int) -> None:
    async with engine_on(chunk=chunk) as (engine, server):
        stop = bytes(expected(server, PROMPT, 3)[0][10:13]).decode()
        tokens, logprobs = expected(server, PROMPT, 3, stop=(stop,))
        got = await ask(engine, request(PROMPT, n=LONG, seed=3, stop=(stop,)))
        assert (got.tokens, got.logprobs) == (tokens, logprobs)
        assert got.end is not None
        assert (got.end.reason, got.end.text_complete) == ("stop", True)
        whole = bytes(tokens).decode()
        assert got.text == whole[: whole.index(stop)]


async def test_a_stop_token_ends_a_response_and_belongs_to_it() -> None:
    async with engine_on() as (engine, server):
        tokens, logprobs = expected(server, PROMPT, 2, stop_token_ids=(ord("e"),))
        got = await ask(engine, request(PROMPT, n=LONG, seed=2, stop_token_ids=(ord("e"),)))
        assert (got.tokens, got.logprobs) == (tokens, logprobs)
        assert got.tokens[-1] == ord("e")


async def test_a_response_goes_on_from_its_tokens() -> None:
    async with engine_on() as (engine, server):
        tokens, logprobs = expected(server, PROMPT, 4)
        begun = await ask(engine, request(PROMPT, n=8, seed=4))
        rest = await ask(engine, request(PROMPT, generated=begun.tokens, n=LONG, seed=99))
        assert begun.tokens + rest.tokens == tokens
        assert begun.logprobs + rest.logprobs == logprobs
        assert server.requests[1]["prompt"] == PROMPT + tokens[:8]


async def test_a_request_says_everything_that_shapes_the_draw() -> None:
    engine = OpenAITokens(name="oai", url="http://127.0.0.1:1", model="m", dialect="vllm", logprobs="raw")
    body = engine.body(request([1, 2], n=5, seed=9, temperature=0.5, top_p=0.9, top_k=3, min_p=0.1))
    assert (body["temperature"], body["top_p"], body["top_k"], body["min_p"]) == (0.5, 0.9, 3, 0.1)
    assert (body["model"], body["seed"], body["max_tokens"], body["repetition_penalty"]) == ("m", 9, 5, 1.0)
    assert (body["return_token_ids"], body["stream"]) == (True, True)


async def test_no_more_tokens_are_asked_for_than_fit() -> None:
    async with engine_on(context_tokens=40) as (engine, server):
        await engine.probe()
        got = await ask(engine, request(PROMPT, n=LONG, seed=7))
        assert server.requests[0]["max_tokens"] == 40 - len(PROMPT)
        assert got.end is not None
        assert len(got.tokens) == 40 - len(PROMPT)
        assert got.end.reason == "length"


@pytest.mark.parametrize("prompt", [[1] * 2000, [*PROMPT, -1], [*PROMPT, 1000]])
async def test_what_the_server_refuses_is_a_refusal(prompt: list[int]) -> None:
    async with engine_on() as (engine, _):
        with pytest.raises(EngineRejected, match=r"tokens are longer|out of vocabulary"):
            await ask(engine, request(prompt, n=8))


async def test_a_cancelled_request_keeps_its_tokens_and_closes_its_connection() -> None:
    async with engine_on() as (engine, server):
        server.hold_after = 6
        got = Got()
        with anyio.CancelScope() as scope:

            def sink(tokens: Sequence[int], logprobs: Sequence[float] | None, text: str) -> None:
                got.sink(tokens, logprobs, text)
                if len(got.tokens) >= 6:
                    scope.cancel()

            await engine.generate(request(PROMPT, n=LONG, seed=2), sink)
        with anyio.fail_after(DEADLINE_S):
            await until(lambda: server.left == ["1"] and not server.running)
        assert got.tokens == expected(server, PROMPT, 2)[0][:6]


# -- faults -----------------------------------------------------------------------------------------------------------

BROKEN = ["reset", "cut", "garbage", "ends early", "no log-probability", "no token ids", "other reason", "error 503"]
REFUSED = ["400", "401", "404", "422", "error 400"]
NOT_NOW = ["204", "429", "500", "503", "error 503"]


@pytest.mark.parametrize("fault", BROKEN)
async def test_a_broken_stream_keeps_what_came(fault: str) -> None:
    async with engine_on() as (engine, server):
        server.faults = [fault]
        got = Got()
        with pytest.raises(EngineUnavailable), anyio.fail_after(DEADLINE_S):
            await engine.generate(request(PROMPT, n=LONG, seed=1), got.sink)
        assert got.tokens == expected(server, PROMPT, 1)[0][:6]
        assert len(server.requests) == 1, "adapters do not retry"


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
        assert len(server.requests) == 1, "adapters do not retry"


async def test_a_server_that_is_gone_is_unavailable() -> None:
    async with engine_on() as (_, server):
        pass
    engine = OpenAIEngine(name="gone", url=server.url)
    for call in (engine.probe, lambda: engine.tokenize("x"), lambda: ask(engine, request(PROMPT))):
        with pytest.raises(EngineUnavailable):
            await call()
    await engine.aclose()


# -- what it says of itself -------------------------------------------------------------------------------------------


async def test_a_probe_tells_model_and_context_and_draws_once_only() -> None:
    async with engine_on() as (engine, server):
        for _ in range(3):
            info = await engine.probe()
        assert (info.model, info.context_tokens, info.logprobs) == ("fake/model", 1024, "temperature")
        assert len(server.drawn) == 1


async def test_the_model_can_be_chosen() -> None:
    async with engine_on({"model": "fake/other"}) as (engine, server):
        info = await engine.probe()
        await ask(engine, request(PROMPT, n=4))
        assert (info.model, info.context_tokens) == ("fake/other", 64)
        assert server.requests[0]["model"] == "fake/other"
    async with engine_on({"model": "nonsense"}) as (engine, _):
        with pytest.raises(EngineUnavailable, match="fake/model, fake/other"):
            await engine.probe()


@pytest.mark.parametrize(
    ("lacks", "says"),
    [
        ({"token_ids"}, "no token ids"),
        ({"logprobs"}, "no log-probabilities"),
        ({"token_ids", "logprobs"}, "no token ids .* and no log-probabilities"),
        ({"tokenize"}, "/tokenize"),
    ],
)
@pytest.mark.parametrize("is_vllm", [True, False])
async def test_a_server_that_cannot_be_trained_from_is_told_what_it_lacks(
    lacks: set[str], says: str, is_vllm: bool
) -> None:
    async with engine_on(is_vllm=is_vllm, lacks=frozenset(lacks | {"props"})) as (engine, _):
        with pytest.raises(EngineUnavailable, match=says):
            await engine.probe()


async def test_another_server_with_token_ids_can_be_used() -> None:
    async with engine_on(is_vllm=False, lacks=frozenset({"props"})) as (engine, server):
        assert (await engine.probe()).model == "fake/model"
        assert (await ask(engine, request(PROMPT, n=LONG, seed=1))).tokens == expected(server, PROMPT, 1)[0]


async def test_a_dialect_that_is_given_is_not_looked_for() -> None:
    async with engine_on({"dialect": "vllm"}) as (engine, server):
        await engine.probe()
        assert "/version" not in server.asked


async def test_a_dialect_is_found_out_once_and_not_before_the_server_can_be_used() -> None:
    async with engine_on(lacks=frozenset({"logprobs"})) as (engine, server):
        for _ in range(2):
            with pytest.raises(EngineUnavailable, match="no log-probabilities"):
                await engine.probe()
        assert server.asked.count("/version") == 2
        server.lacks = frozenset()
        for _ in range(3):
            await engine.probe()
        assert server.asked.count("/version") == 3


async def test_a_server_that_is_just_starting_is_not_taken_for_another_one() -> None:
    async with engine_on() as (engine, server):
        server.path_faults = {"/health": "503", "/version": "503"}
        with pytest.raises(EngineUnavailable):
            await engine.probe()
        server.path_faults = {}
        with anyio.fail_after(DEADLINE_S):
            async with anyio.create_task_group() as tasks:
                await tasks.start(engine.run)
                await engine.probe()
                tasks.cancel_scope.cancel()
        await engine.probe()
        assert "/version" in server.asked


@pytest.mark.parametrize("lacks", [{"completions"}, {"completions", "tokenize", "detokenize"}, {"token_ids"}])
async def test_text_alone_is_never_fallen_back_to_and_how_to_want_it_is_said(lacks: set[str]) -> None:
    async with engine_on(is_vllm=False, lacks=frozenset(lacks | {"props"})) as (engine, server):
        with pytest.raises(EngineUnavailable, match="use dialect: chat"):
            await engine.probe()
        assert "/v1/chat/completions" not in server.asked


# -- what ends a sequence ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dialect", "sampling", "found"),
    [
        ("vllm", {}, (256,)),
        ("vllm", {"stop": ("never said",)}, (256,)),
        ("vllm", {"stop": ("e",)}, ()),
        ("vllm", {"stop_token_ids": (ord("e"),)}, ()),
        ("vllm", {"stop_token_ids": (256,)}, ()),
        ("generic", {}, (256,)),
        ("generic", {"stop": ("e",)}, ()),
    ],
)
async def test_what_ends_a_sequence_is_learned(dialect: str, sampling: dict[str, Any], found: tuple[int, ...]) -> None:
    async with engine_on({"dialect": dialect}) as (engine, _):
        assert (await engine.probe()).end_ids == ()
        await ask(engine, request(PROMPT, n=3))
        assert (await engine.probe()).end_ids == (), "cut is no end"
        await ask(engine, request(PROMPT, n=LONG, **sampling))
        assert (await engine.probe()).end_ids == found


async def test_a_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OAI_TEST_KEY", "secret")
    async with engine_on({"api_key_env": "OAI_TEST_KEY"}, key="secret") as (engine, _):
        assert (await engine.probe()).model == "fake/model"
    async with engine_on(key="secret") as (engine, _):
        with pytest.raises(EngineUnavailable, match="Unauthorized"):
            await engine.probe()
    monkeypatch.delenv("OAI_TEST_KEY")
    async with engine_on({"api_key_env": "OAI_TEST_KEY"}, key="secret") as (engine, _):
        with pytest.raises(EngineUnavailable, match="OAI_TEST_KEY"):
            await engine.probe()


# -- log-probabilities ------------------------------------------------------------------------------------------------

PLAIN: dict[str, Any] = {}
COLD = {"temperature": 0.0}
WARM = {"temperature": 0.7}
CUT = {"top_p": 0.9}


@pytest.mark.parametrize(
    ("is_processed", "promised", "sampling", "is_given"),
    [
        (False, "temperature", PLAIN, True),
        (False, "temperature", COLD, True),
        (False, "temperature", CUT, True),
        (False, "temperature", WARM, False),
        (False, "raw", WARM | CUT, True),
        (True, "temperature", PLAIN, True),
        (True, "temperature", WARM, True),
        (True, "temperature", CUT, False),
        (True, "temperature", WARM | CUT, False),
        (True, "raw", PLAIN, True),
        (True, "raw", WARM, False),
        (True, "raw", CUT, False),
    ],
)
async def test_log_probabilities_other_than_promised_are_refused(
    is_processed: bool, promised: str, sampling: dict[str, Any], is_given: bool
) -> None:
    async with engine_on({"logprobs": promised}, is_processed=is_processed) as (engine, server):
        await engine.probe()
        if is_given:
            assert (await ask(engine, request(PROMPT, n=4, **sampling))).tokens
        else:
            with pytest.raises(EngineRejected, match="log-probabilities"):
                await ask(engine, request(PROMPT, n=4, **sampling))
            assert server.requests == []


# -- text -------------------------------------------------------------------------------------------------------------


async def test_text_of_tokens_has_no_control_tokens_and_keeps_what_looks_like_them() -> None:
    async with engine_on() as (engine, server):
        tokens = [*b"<b>[1]", 256, *b"x", 256]
        assert await engine.detokenize(tokens) == "<b>[1]x"
        drawn = len(server.drawn)
        assert await engine.detokenize(tokens) == "<b>[1]x"
        assert len(server.drawn) == drawn, "what is known of a token is remembered"
        assert await engine.detokenize([]) == ""


# -- through the pool -------------------------------------------------------------------------------------------------

SAMPLING = SamplingParams(max_new_tokens=LONG)
PROMPTS = [list(f"prompt {i}:".encode()) for i in range(6)]


async def finish(pool: EnginePool, samples: Sequence[Sample]) -> None:
    with anyio.fail_after(DEADLINE_S):
        async with anyio.create_task_group() as tasks:
            for sample, prompt in zip(samples, PROMPTS, strict=False):
                tasks.start_soon(pool.generate, sample, prompt, SAMPLING)


def assert_as_expected(server: FakeOpenAI, samples: Sequence[Sample]) -> None:
    for sample, prompt in zip(samples, PROMPTS, strict=False):
        tokens, logprobs = server.script.expected_response(prompt, SAMPLING, 5)
        assert list(sample.tokens) == tokens
        assert sample.logprobs is not None
        assert list(sample.logprobs) == pytest.approx(logprobs)
        assert sample.text == bytes(tokens[:-1]).decode()
        assert sample.status is SampleStatus.COMPLETED


@pytest.fixture
def quick_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_pause, "PAUSE_CHECK_INTERVAL_S", 0.02)


@pytest.mark.parametrize("how", ["interrupt", "pause that lets wait", "pause that refuses"])
async def test_aborted_generations_go_on_to_exactly_the_whole_response(how: str, quick_pauses: None) -> None:
    async with (
        engine_on(index_of=lambda _: 5, pause_status=503 if how == "pause that refuses" else None) as (engine, server),
        running_pool(engine, chunk_tokens=64, max_retries=0, stall_s=1.0) as pool,
    ):
        server.hold_after = 9
        samples = [Sample(index=i) for i in range(len(PROMPTS))]

        async def meddle() -> None:
            await until(lambda: all(len(sample.tokens) >= 9 for sample in samples))
            if how == "interrupt":
                assert pool.interrupt() == len(samples)
                server.hold_after = None
                return
            await engine._http.ask_raw("/pause?mode=abort", {})
            server.hold_after = None
            checked = server.pause_checks
            await until(lambda: server.pause_checks > checked + 3)
            await engine._http.ask_raw("/resume", {})

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(meddle)
            await finish(pool, samples)
        assert_as_expected(server, samples)
        assert all(sample.metadata["pieces"] == 2 for sample in samples)
        assert pool.statistics()[0].failed == 0, "a pause is no failure"


@pytest.mark.parametrize("pause_status", [None, 503])
async def test_a_pause_longer_than_the_stall_deadline_is_no_stall(pause_status: int | None, quick_pauses: None) -> None:
    async with (
        engine_on(index_of=lambda _: 5, pause_status=pause_status) as (engine, server),
        running_pool(engine, max_retries=0, stall_s=0.5) as pool,
    ):
        await engine._http.ask_raw("/pause?mode=keep", {})
        samples = [Sample(index=0)]

        async def resume() -> None:
            await until(lambda: server.pause_checks > 40)  # 0.02 s each, and so longer than the stall deadline
            await engine._http.ask_raw("/resume", {})

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(resume)
            await finish(pool, samples)
        assert_as_expected(server, samples)


async def test_many_requests_that_wait_ask_for_the_pause_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    async with engine_on(pause_status=503) as (engine, server), running_engine(engine):
        await engine._http.ask_raw("/pause?mode=keep", {})
        signs: list[int] = []
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as tasks:

                def sink(_tokens: Any, _logprobs: Any, _text: str) -> None:
                    signs.append(1)
                    if len(signs) == 20:
                        scope.cancel()

                for seed in range(20):
                    tasks.start_soon(engine.generate, request(PROMPT, seed=seed), sink)
        assert len(signs) == 20
        assert server.pause_checks == 1


async def test_what_was_known_before_a_refusal_says_nothing_of_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_pause, "PAUSE_CHECK_INTERVAL_S", 0.5)
    async with engine_on(pause_status=503) as (engine, server):
        server.faults = ["503"]
        with pytest.raises(EngineUnavailable):
            await ask(engine, request(PROMPT, n=4))
        server.resumed.clear()

        async def resume() -> None:
            await until(lambda: server.pause_checks == 2)
            server.resumed.set()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(resume)
            assert len((await ask(engine, request(PROMPT, n=4))).tokens) == 4


async def test_a_server_without_pauses_is_not_asked_again() -> None:
    async with fake_openai(is_vllm=False, pause_status=503) as server:
        engine = OpenAIEngine(name="oai", url=server.url, dialect="generic")
        await engine.probe()
        server.resumed.clear()
        for _ in range(3):
            with pytest.raises(EngineUnavailable, match="is paused"):
                await ask(engine, request(PROMPT, n=4))
        assert server.asked.count("/is_paused") == 1
        await engine.aclose()


@pytest.mark.parametrize("fault", [*BROKEN, "503"])
async def test_samples_go_on_after_any_fault(fault: str) -> None:
    async with engine_on(index_of=lambda _: 5) as (engine, server), running_pool(engine) as pool:
        server.faults = [fault] * 2  # a third would take the only engine out of use for a while
        samples = [Sample(index=i) for i in range(len(PROMPTS))]
        await finish(pool, samples)
        assert_as_expected(server, samples)


async def test_a_server_that_never_answers_stalls() -> None:
    async with engine_on() as (engine, server), running_pool(engine, stall_s=0.05, max_retries=1) as pool:
        server.faults = ["never answers"] * 2
        with anyio.fail_after(DEADLINE_S), pytest.raises(GenerationFailed) as caught:
            await pool.generate(Sample(index=0), PROMPT, SAMPLING)
        assert isinstance(caught.value.__cause__, EngineStalled)
