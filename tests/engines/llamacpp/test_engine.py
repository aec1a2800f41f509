"""What is the llama.cpp adapter's own: its options, its text, closing it, and stop tokens in gaps."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import pytest

from orchestrator.engines.embedded.tiny_model import END, write_tiny_model
from orchestrator.engines.http.client import EngineHttp
from orchestrator.engines.llamacpp.engine import LlamaCppEngine
from orchestrator.engines.port import SamplingParams
from orchestrator.errors import EngineStalled, EngineUnavailable
from tests.support.engine_pools import DEADLINE_S, Got, ask, request, running_engine
from tests.support.http_faults import Reply, answer, end_event, fault_server, stream, token_event
from tests.support.paths import ROOT

SLOTS, CONTEXT_TOKENS = 4, 1024


@contextmanager
def llama_server(model: Path) -> Iterator[str]:
    """The address of a real server in a process of its own."""
    command = [sys.executable, "-m", "orchestrator.engines.embedded.server", str(model)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [*command, str(SLOTS), str(CONTEXT_TOKENS), "1"],
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


@pytest.fixture(scope="module")
def readable_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its model writes printable ASCII."""
    model = tmp_path_factory.mktemp("models") / "readable.gguf"
    write_tiny_model(model)
    with llama_server(model) as url:
        yield url


@pytest.fixture(scope="module")
def byte_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its model writes any bytes: half of them begin or continue a character."""
    model = tmp_path_factory.mktemp("models") / "bytes.gguf"
    write_tiny_model(model, ascii_only=False)
    with llama_server(model) as url:
        yield url


async def test_a_cached_prefix_does_not_change_log_probabilities(readable_server: str) -> None:
    engine = LlamaCppEngine(name="e", url=readable_server)
    async with running_engine(engine):
        asked = request(b"a prefix that is long enough to matter", n=24, seed=9)
        first, again = await ask(engine, asked), await ask(engine, asked)
        assert first.tokens == again.tokens
        assert first.logprobs == pytest.approx(again.logprobs, abs=1e-3)


async def test_truncation_draws_from_the_likeliest_alone(readable_server: str) -> None:
    engine = LlamaCppEngine(name="e", url=readable_server)
    async with running_engine(engine):
        greedy = await ask(engine, request(b"top", n=16, temperature=0.0))
        for options in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
            received = await ask(engine, request(b"top", n=16, seed=4, **options))  # type: ignore[arg-type]
            assert received.tokens == greedy.tokens, options


@pytest.mark.parametrize(
    ("sampling", "logprobs", "is_fine"),
    [
        (SamplingParams(), "temperature", True),
        (SamplingParams(top_p=0.9), "temperature", True),
        (SamplingParams(temperature=0.7), "temperature", True),
        (SamplingParams(temperature=0.0, top_k=5), "temperature", True),
        (SamplingParams(temperature=0.7, top_p=0.9), "temperature", False),
        (SamplingParams(temperature=0.7, min_p=0.1), "temperature", False),
        (SamplingParams(temperature=0.7, top_k=5), "raw", True),
    ],
)
def test_what_the_server_cannot_give_is_said_before(sampling: SamplingParams, logprobs: str, is_fine: bool) -> None:
    engine = LlamaCppEngine(name="e", url="http://127.0.0.1:1", logprobs=logprobs)  # type: ignore[arg-type]
    why = engine.supports(sampling)
    assert (why is None) is is_fine
    assert why is None or "logprobs: raw" in why


async def test_a_stop_token_in_a_gap_ends_the_response(byte_server: str) -> None:
    engine = LlamaCppEngine(name="e", url=byte_server)
    async with running_engine(engine):
        stopped = 0
        for seed in range(9):
            whole = await ask(engine, request(b"stop", n=24, seed=seed))
            stop = next((token for token in whole.tokens if 128 <= token < 256), None)
            if stop is None:
                continue
            received = await ask(engine, request(b"stop", n=24, seed=seed, stop_token_ids=(stop,)))
            assert received.end is not None
            assert received.end.reason == "stop"
            assert received.tokens == whole.tokens[: whole.tokens.index(stop) + 1]
            stopped += 1
        assert stopped > 3


async def test_text_without_control_tokens_that_a_response_may_have_written_itself(readable_server: str) -> None:
    engine = LlamaCppEngine(name="e", url=readable_server)
    async with running_engine(engine):
        written = list(b"say <|end|> twice")
        for tokens in ([*written, 257], written, [256, *written, 258, 257]):
            assert await engine.detokenize(tokens) == "say <|end|> twice"
        assert await engine.detokenize([257]) == await engine.detokenize([]) == ""


async def test_an_ordinary_token_that_text_is_cut_into_otherwise_is_not_left_out() -> None:
    rows = [[1, 9], [1, 2], [9], [9], [1, 9], [1, 2]]  # with special tokens and without, in turn
    async with fault_server(tokenize=[answer({"tokens": row}) for row in rows]) as server:
        engine = LlamaCppEngine(name="e", url=server.url)
        async with running_engine(engine):
            assert await engine.detokenize([1, 9]) == "text"
        asked = [body["tokens"] for path, body in server.requests if path == "/detokenize"]
    assert asked == [[1, 9], [9], [1, 9]]


async def test_nothing_comes_after_an_end_of_sequence_that_shows_a_gap(byte_server: str) -> None:
    engine = LlamaCppEngine(name="e", url=byte_server)
    async with running_engine(engine):
        in_gaps = 0
        for seed in range(16):
            got = await ask(engine, request(b"end", n=400, seed=seed))
            assert got.end is not None
            assert got.end.reason == "stop"
            assert got.tokens.index(END) == len(got.tokens) - 1
            in_gaps += len(got.tokens) > 1 and got.tokens[-2] >= 128
        assert in_gaps > 3


async def test_a_stop_text_that_shows_a_gap_ends_the_response(byte_server: str) -> None:
    engine = LlamaCppEngine(name="e", url=byte_server)
    async with running_engine(engine):
        stopped = 0
        for seed in range(200):
            whole = (await ask(engine, request(b"stop", n=8, seed=seed))).tokens
            # a byte that the server takes for the first of two, then an ordinary character
            at = next((i for i in range(1, len(whole)) if whole[i] < 128 and 0xC0 <= whole[i - 1] < 0xE0), None)
            if at is None or whole[at] in whole[:at] or any(token >= 128 for token in whole[: at - 1]):
                continue
            got = await ask(engine, request(b"stop", n=8, seed=seed, stop=(chr(whole[at]),)))
            assert got.end is not None
            assert (got.tokens, got.end.reason) == (whole[: at + 1], "stop")
            stopped += 1
        assert stopped > 1


async def test_what_ends_a_sequence_is_known_from_the_beginning(readable_server: str) -> None:
    engine = LlamaCppEngine(name="e", url=readable_server)
    async with running_engine(engine):
        assert (await engine.probe()).end_ids == (END,)


async def test_another_token_that_ends_a_sequence_is_learned() -> None:
    ended = stream([token_event(65, 1), token_event(66, 2, content=""), end_event(2)])
    async with fault_server(completion=ended) as server:
        engine = LlamaCppEngine(name="e", url=server.url)
        async with running_engine(engine):
            assert (await engine.probe()).end_ids == ()
            await ask(engine, request(b"x"))
            assert (await engine.probe()).end_ids == (66,)


# -- deadlines and the end --------------------------------------------------------------------------------------------


async def test_closing_ends_what_is_under_way_and_nothing_begins_again() -> None:
    async with fault_server(completion=stream([token_event(65, 1)], then="hang")) as server:
        engine = LlamaCppEngine(name="e", url=server.url)
        begun, got = anyio.Event(), Got()

        async def cut() -> None:
            with pytest.raises(EngineUnavailable, match="closed"):
                await engine.generate(request(b"x"), lambda *given: (got.sink(*given), begun.set())[0])

        with anyio.fail_after(DEADLINE_S):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(cut)
                await begun.wait()
                await engine.aclose()
        assert got.tokens == [65]
        with pytest.raises(EngineUnavailable, match="closed"):
            await engine.probe()


async def test_a_question_has_a_deadline() -> None:
    async with fault_server(tokenize=Reply(status=0, then="hang")) as server:
        http = EngineHttp(kind="llama.cpp server", name="e", url=server.url, max_streams=1, connect_timeout_s=1)
        with anyio.fail_after(DEADLINE_S), pytest.raises(EngineStalled, match=r"no answer within 0\.05 s"):
            await http.ask_raw("/tokenize", {}, deadline_s=0.05)
        await http.aclose()


async def test_while_a_gap_is_closed_there_are_signs_of_life_and_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.engines.llamacpp.engine.REPEAT_MARGIN_S", 0.2)
    monkeypatch.setattr("orchestrator.engines.llamacpp.gaps.SIGN_OF_LIFE_INTERVAL_S", 0.01)
    gap = stream([token_event(65, 1), token_event(67, 3), end_event(3)])
    async with fault_server(completion=[gap, Reply(status=0, then="hang")]) as server:
        engine, calls = LlamaCppEngine(name="e", url=server.url), list[int]()
        async with running_engine(engine):
            with anyio.fail_after(DEADLINE_S), pytest.raises(EngineStalled):
                await engine.generate(request(b"x"), lambda tokens, _logprobs, _text: calls.append(len(tokens)))
    assert calls[0] == sum(calls) == 1
    assert len(calls) > 3


async def test_a_repetition_is_asked_for_no_more_than_shows_the_gap() -> None:
    gap = stream([token_event(65, 1), token_event(67, 3), end_event(3)])
    refused = answer({"error": {"message": "enough"}}, 500)
    async with fault_server(completion=[gap, refused]) as server:
        engine = LlamaCppEngine(name="e", url=server.url)
        async with running_engine(engine):
            with pytest.raises(EngineUnavailable, match="enough"):
                await ask(engine, request(b"x", n=500))
        (_, streamed), (_, repeated) = server.requests
    assert streamed | {"stream": False, "n_predict": 3} == repeated | {"stream": False}
