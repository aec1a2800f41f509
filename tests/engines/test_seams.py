"""A response that is put together from several requests is the one that a single request would have given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import anyio
import pytest

from orchestrator.engines import EngineInfo, GenerationEnd, GenerationRequest, SamplingParams, ScriptedEngine, TokenSink
from orchestrator.errors import EngineRejected, EngineStalled, EngineUnavailable
from orchestrator.records import Sample, SampleStatus
from tests.support.engine_pools import DEADLINE_S, running_pool
from tests.support.engine_time import JUMPING

PROMPT = list(b"a prompt of 24 bytes ...")


@pytest.fixture
def anyio_backend() -> tuple[str, Any]:
    """Waits cost nothing: no test here has a socket, a file or a thread."""
    return ("asyncio", dict(JUMPING))


class Shortsighted(ScriptedEngine):
    """Looks for stop texts as a server does: in what one request generates, and in nothing before it."""

    async def generate(self, request: GenerationRequest, sink: TokenSink) -> GenerationEnd:
        seen = bytearray()
        tail = [stop.encode() for stop in request.sampling.stop]

        def watch(tokens: Sequence[int], logprobs: Sequence[float] | None, text: str) -> None:
            if not any(stop in seen for stop in tail):
                seen.extend(token for token in tokens if token < 256)
                sink(tokens, logprobs, text)

        end = await super().generate(replace(request, sampling=replace(request.sampling, stop=())), watch)
        return GenerationEnd("stop", text_complete=False) if any(stop in seen for stop in tail) else end


def engine(kind: type[ScriptedEngine] = ScriptedEngine, **options: Any) -> ScriptedEngine:
    return kind(**{"name": "e", "chunk": 1, "seed": 3} | options)


@pytest.mark.parametrize("chunk", [None, *range(1, 12)])
async def test_a_stop_text_across_the_end_of_a_chunk_ends_the_response(chunk: int | None) -> None:
    whole = engine()
    text = bytes(whole.expected_response(PROMPT, SamplingParams(max_new_tokens=60), 0)[0]).decode()
    sampling = SamplingParams(max_new_tokens=60, stop=(text[7:12],))
    expected, logprobs = whole.expected_response(PROMPT, sampling, 0)
    async with running_pool(engine(Shortsighted), chunk_tokens=chunk) as pool:
        sample = Sample(index=0)
        await pool.generate(sample, PROMPT, sampling)
    assert list(sample.tokens) == expected
    assert sample.logprobs is not None
    assert list(sample.logprobs) == pytest.approx(logprobs)
    assert (sample.status, sample.finish_reason) == (SampleStatus.COMPLETED, "stop")
    assert sample.text == text[: text.index(text[7:12])]


class AtOnce(ScriptedEngine):
    """Hands over token by token without a pause between, as a stream does whose events came together."""

    async def generate(self, request: GenerationRequest, sink: TokenSink) -> GenerationEnd:
        held: list[tuple[Sequence[int], Sequence[float] | None, str]] = []
        rest = replace(request, sampling=replace(request.sampling, stop=()))
        end = await super().generate(rest, lambda *what: held.append(what))
        for what in held:
            sink(*what)
        return end


@pytest.mark.parametrize("chunk", [9, 10, 11])
async def test_nothing_that_came_together_with_a_stop_text_follows_it(chunk: int) -> None:
    """The stop text began in the request before, so that the engine does not see it and goes on."""
    whole = engine()
    text = bytes(whole.expected_response(PROMPT, SamplingParams(max_new_tokens=60), 0)[0]).decode()
    sampling = SamplingParams(max_new_tokens=60, stop=(text[7:12],))
    expected, _ = whole.expected_response(PROMPT, sampling, 0)
    async with running_pool(engine(AtOnce), chunk_tokens=chunk) as pool:
        sample = Sample(index=0)
        await pool.generate(sample, PROMPT, sampling)
        assert pool.statistics()[0].completed == 2
    assert list(sample.tokens) == expected
    assert sample.logprobs is not None
    assert len(sample.logprobs) == sum(count for _, count in sample.versions) == len(expected)
    assert (sample.finish_reason, sample.text) == ("stop", text[: text.index(text[7:12])])


async def test_a_sample_that_was_cut_just_after_its_stop_text_is_finished() -> None:
    sampling = SamplingParams(max_new_tokens=60, stop=("END",))
    sample = Sample(index=0)
    sample.extend(list(b"some text END"), [-1.0] * 13, 0)
    async with running_pool(engine(Shortsighted)) as pool:
        await pool.generate(sample, PROMPT, sampling)
        assert pool.statistics()[0].completed == 0
    assert (bytes(list(sample.tokens)), sample.text, sample.finish_reason) == (b"some text END", "some text ", "stop")


async def test_a_sample_that_was_cut_just_after_its_stop_token_is_finished() -> None:
    sample = Sample(index=0)
    sample.extend([65, 66], [-1.0] * 2, 0)
    async with running_pool(engine()) as pool:
        await pool.generate(sample, PROMPT, SamplingParams(stop_token_ids=(66,)))
        assert pool.statistics()[0].completed == 0
    assert (list(sample.tokens), sample.status) == ([65, 66], SampleStatus.COMPLETED)


@pytest.mark.parametrize("chunk", [None, 1, 5, 10, 19, 20, 21])
async def test_a_response_ends_with_the_context_wherever_a_chunk_ends(chunk: int | None) -> None:
    async with running_pool(engine(context_tokens=len(PROMPT) + 20), chunk_tokens=chunk) as pool:
        sample = Sample(index=0)
        await pool.generate(sample, PROMPT, SamplingParams(max_new_tokens=99))
    assert (len(sample.tokens), sample.status) == (20, SampleStatus.TRUNCATED)


async def test_the_text_of_characters_across_chunks_is_whole() -> None:
    for chunk in (None, 1, 2, 5):
        async with running_pool(engine(echo_rate=1.0, chunk=chunk or 16), chunk_tokens=chunk) as pool:
            sample = Sample(index=0)
            await pool.generate(sample, list("say Größe東京🙂".encode()), SamplingParams(max_new_tokens=99))
        assert sample.text == "Größe東京🙂"


class Recorder(ScriptedEngine):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.requests: list[GenerationRequest] = []

    async def generate(self, request: GenerationRequest, sink: TokenSink) -> GenerationEnd:
        self.requests.append(request)
        return await super().generate(request, sink)


async def test_every_request_has_a_seed_of_its_own_and_the_same_in_every_run() -> None:
    seeds: list[list[int | None]] = []
    for _ in range(2):
        recorder = Recorder(name="e")
        async with running_pool(recorder, chunk_tokens=8) as pool:
            for index, trial in ((0, 0), (1, 0), (0, 1)):
                sampling = SamplingParams(max_new_tokens=24)
                await pool.generate(Sample(index=index), PROMPT, sampling, trial=trial)
        seeds.append([request.seed for request in recorder.requests])
    assert seeds[0] == seeds[1]
    assert len(seeds[0]) == len(set(seeds[0])) == 9


@pytest.mark.parametrize("keep_partials", [True, False])
async def test_an_interruption_between_two_requests_is_not_missed(keep_partials: bool) -> None:
    version = 0
    async with running_pool(
        engine(), chunk_tokens=8, keep_partials=keep_partials, policy_version=lambda: version
    ) as pool:

        async def cut(sample: Sample) -> None:
            nonlocal version
            if len(sample.tokens) == 16 and version == 0:
                assert pool.interrupt() == 0
                version = 1

        sample = Sample(index=0)
        await pool.generate(sample, PROMPT, SamplingParams(max_new_tokens=24), after_piece=cut)
    assert sample.versions == ([[0, 16], [1, 8]] if keep_partials else [[1, 24]])


# -- one bad engine ---------------------------------------------------------------------------------------------------


async def test_an_engine_that_fails_at_once_does_not_draw_the_retries_to_itself() -> None:
    bad = engine(name="bad", failure_rate=0.6, max_in_flight=64)
    good = engine(name="good", max_in_flight=2)
    async with running_pool(bad, good, max_retries=1) as pool:
        for index in range(60):
            sample = Sample(index=index)
            await pool.generate(sample, PROMPT, SamplingParams(max_new_tokens=8))
            assert sample.status is SampleStatus.TRUNCATED, "one retry is enough"
        assert pool.statistics()[0].failed >= 5


class Tongueless(ScriptedEngine):
    """Cannot tokenise after its first probe."""

    asked = 0
    error: type[Exception] | None = None

    async def tokenize(self, text: str) -> list[int]:
        self.asked += 1
        if self.asked == 1:
            return await super().tokenize(text)
        if self.error is None:
            await anyio.sleep_forever()
        assert self.error is not None
        raise self.error(self.name, "no")


@pytest.mark.parametrize("error", [EngineUnavailable, EngineStalled, None])
async def test_text_goes_to_the_next_engine_when_one_fails_at_it(error: type[Exception] | None) -> None:
    bad = Tongueless(name="bad")
    bad.error = error
    async with running_pool(bad, engine(name="good"), max_retries=0) as pool:
        with anyio.fail_after(DEADLINE_S * 10):
            assert await pool.tokenize("x") == [120]
            assert bad.asked == 2, "once by the probe and once by us"
            for _ in range(5):
                assert await pool.tokenize("x") == [120]


async def test_a_text_that_is_refused_is_not_tried_again() -> None:
    bad = Tongueless(name="bad")
    bad.error = EngineRejected
    async with running_pool(bad) as pool:
        with pytest.raises(EngineRejected):
            await pool.tokenize("x")
        assert bad.asked == 2


async def test_an_engine_that_refuses_the_probe_text_is_down_and_the_pool_lives() -> None:
    class Refusing(ScriptedEngine):
        async def tokenize(self, text: str) -> list[int]:
            raise EngineRejected(self.name, "401: who are you?")

        async def probe(self) -> EngineInfo:
            return await super().probe()

    async with running_pool(Refusing(name="bad"), engine(name="good")) as pool:
        states = {member.name: member.state for member in pool.statistics()}
        assert states == {"bad": "down", "good": "up"}
        sample = Sample(index=0)
        await pool.generate(sample, PROMPT, SamplingParams(max_new_tokens=8))
        assert "who are you" in str(pool.statistics()[0].last_error)
    assert len(sample.tokens) == 8
