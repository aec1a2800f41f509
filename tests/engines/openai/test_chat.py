"""Servers that give text alone: what is asked of them, what comes, and how it fails."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

from orchestrator.engines import GenerationRequest, ParameterUpdate, SamplingParams
from orchestrator.engines.openai import vllm_pause
from orchestrator.engines.openai.chat import OpenAIChat
from orchestrator.engines.openai.engine import OpenAIEngine
from orchestrator.errors import EngineError, EngineRejected, EngineUnavailable
from tests.support.engine_pools import DEADLINE_S, Got, ask, running_engine
from tests.support.fake_openai import FakeOpenAI, fake_openai
from tests.support.fake_server import until
from tests.support.http_faults import answer, fault_server, stream

MESSAGES = [{"role": "user", "content": "Say something."}]
PROMPT = list(b"user: Say something.\nassistant: ")
LONG = 300


def chat_request(n: int = LONG, seed: int | None = 0, **sampling: Any) -> GenerationRequest:
    params = SamplingParams(max_new_tokens=n, **sampling)
    return GenerationRequest("0-0-0", [], n, params, seed=seed, messages=MESSAGES)


@asynccontextmanager
async def chat_on(**how: Any) -> AsyncIterator[tuple[OpenAIEngine, FakeOpenAI]]:
    lacks = frozenset({"props", "completions", "tokenize", "detokenize"})
    async with fake_openai(**{"is_vllm": False, "lacks": lacks} | how) as server:
        engine = OpenAIEngine(name="chat", url=server.url, dialect="chat")
        async with running_engine(engine):
            yield engine, server
            server.released.set()


def expected(server: FakeOpenAI, seed: int, **sampling: Any) -> str:
    params = SamplingParams(max_new_tokens=LONG, **sampling)
    return bytes(t for t in server.script.expected_response(PROMPT, params, seed)[0] if t < 256).decode()


async def test_a_response_comes_as_text_without_tokens() -> None:
    async with chat_on() as (engine, server):
        for seed in range(3):
            calls: list[tuple[int, Sequence[float] | None]] = []
            got = Got()

            def sink(
                tokens: Sequence[int],
                logprobs: Sequence[float] | None,
                text: str,
                got: Got = got,
                calls: list[tuple[int, Sequence[float] | None]] = calls,
            ) -> None:
                got.sink(tokens, logprobs, text)
                calls.append((len(tokens), logprobs))

            end = await engine.generate(chat_request(seed=seed), sink)
            assert (got.text, got.tokens, end.reason, end.text_complete) == (expected(server, seed), [], "stop", True)
            assert len(calls) > 3
            assert set(calls) == {(0, None)}


async def test_a_response_is_cut_at_max_new_tokens_and_at_a_stop_text() -> None:
    async with chat_on() as (engine, server):
        got = await ask(engine, chat_request(n=7, seed=1))
        assert got.end is not None
        assert (got.text, got.end.reason) == (expected(server, 1)[:7], "length")
        stop = expected(server, 1)[10:13]
        got = await ask(engine, chat_request(seed=1, stop=(stop,)))
        assert got.end is not None
        assert (got.text, got.end.reason) == (expected(server, 1).split(stop)[0], "stop")


async def test_a_probe_says_that_there_is_text_alone_and_asks_one_question_only() -> None:
    async with chat_on() as (engine, server):
        for _ in range(3):
            info = await engine.probe()
        assert (info.model, info.text_only, info.policy_version, info.end_ids) == ("fake/model", True, None, ())
        assert len(server.drawn) == 1
        assert server.drawn[0]["max_tokens"] == 1


async def test_a_server_without_chat_is_named() -> None:
    async with chat_on(lacks=frozenset({"chat"})) as (engine, _):
        with pytest.raises(EngineUnavailable, match="/v1/chat/completions"):
            await engine.probe()


async def test_what_needs_token_ids_is_refused() -> None:
    async with chat_on() as (engine, _):
        for call in (
            lambda: engine.tokenize("x"),
            lambda: engine.tokenize_chat(MESSAGES, {}),
            lambda: engine.detokenize([1]),
            lambda: ask(engine, GenerationRequest("0", [1, 2], 4, SamplingParams())),
        ):
            with pytest.raises(EngineRejected, match="dialect: chat"):
                await call()
        with pytest.raises(EngineRejected, match="stop_token_ids"):
            await ask(engine, chat_request(stop_token_ids=(5,)))
        with pytest.raises(EngineRejected, match="set_policy_version"):
            await engine.update_parameters(ParameterUpdate("x", 1))


async def test_only_what_differs_from_the_defaults_of_servers_is_sent() -> None:
    engine = OpenAIChat(name="c", url="http://127.0.0.1:1", model="m")
    body = engine.body(chat_request(n=5, seed=None))
    assert body == {"model": "m", "messages": MESSAGES, "max_tokens": 5, "temperature": 1.0, "stream": True}
    sampling: dict[str, Any] = {"temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "stop": ("x",)}
    body = engine.body(chat_request(n=5, seed=9, **sampling, chat_template_kwargs={"enable_thinking": False}))
    assert {key: body[key] for key in sampling} == sampling | {"stop": ["x"]}
    assert (body["seed"], body["chat_template_kwargs"]) == (9, {"enable_thinking": False})


async def test_a_cancelled_request_closes_its_connection() -> None:
    async with chat_on() as (engine, server):
        server.hold_after = 6
        with anyio.CancelScope() as scope:
            await engine.generate(chat_request(), lambda *_: scope.cancel())
        with anyio.fail_after(DEADLINE_S):
            await until(lambda: server.left == ["1"] and not server.running)


@pytest.mark.parametrize("fault", ["reset", "cut", "garbage", "ends early", "other reason", "error 503", "500", "429"])
async def test_a_broken_stream_makes_it_unavailable(fault: str) -> None:
    async with chat_on() as (engine, server):
        server.faults = [fault]
        with pytest.raises(EngineUnavailable), anyio.fail_after(DEADLINE_S):
            await ask(engine, chat_request())
        assert len(server.requests) == 1, "adapters do not retry"


@pytest.mark.parametrize("fault", ["400", "404", "error 400"])
async def test_a_refusal_keeps_the_servers_words(fault: str) -> None:
    async with chat_on() as (engine, server):
        server.faults = [fault]
        with pytest.raises(EngineError, match="so it was wanted") as caught:
            await ask(engine, chat_request())
        assert type(caught.value) is EngineRejected


async def test_a_pause_of_a_vllm_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_pause, "PAUSE_CHECK_INTERVAL_S", 0.02)
    async with chat_on(is_vllm=True, pause_status=503) as (engine, server):
        server.resumed.clear()

        async def resume() -> None:
            await until(lambda: server.pause_checks > 1)
            server.resumed.set()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(resume)
            got = await ask(engine, chat_request(seed=2))
        assert got.text == expected(server, 2)


async def test_thoughts_are_signs_of_life_and_no_text() -> None:
    deltas: list[dict[str, Any]] = [
        {"role": "assistant", "content": None},
        {"reasoning_content": "well", "content": None},
        {"reasoning": "let me see"},
        {"content": "42"},
    ]
    events = [{"choices": [{"delta": delta, "finish_reason": None}]} for delta in deltas]
    end = {"choices": [{"delta": {}, "finish_reason": "stop"}]}
    replies = {"v1/chat/completions": stream([*events, end, b"[DONE]"])}
    async with fault_server(**replies) as server:
        engine = OpenAIChat(name="c", url=server.url, model="m")
        calls: list[str] = []
        async with running_engine(engine):
            await engine.generate(chat_request(), lambda _tokens, _logprobs, text: calls.append(text))
        assert calls == ["", "", "", "42", ""]


async def test_an_answer_that_is_none_is_named() -> None:
    models = answer({"data": [{"id": "m"}]})
    for wrong in ({}, {"choices": []}, {"choices": [{"text": "x"}]}, b"<html>"):
        replies = {"v1/models": models, "v1/chat/completions": answer(wrong), "metrics": answer({}, 404)}
        async with fault_server(**replies) as server:
            engine = OpenAIChat(name="c", url=server.url)
            with pytest.raises(EngineUnavailable, match="not an answer of a chat server"):
                await engine.probe()
            await engine.aclose()
