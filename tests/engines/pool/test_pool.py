"""The pool: every sample ends once and whole, whatever the engines do, and no slot is lost."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import anyio
import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from orchestrator.engines import (
    EngineInfo,
    EnginePool,
    GenerationEnd,
    GenerationRequest,
    SamplingParams,
    ScriptedEngine,
    TokenSink,
)
from orchestrator.errors import EngineError, EngineRejected, EngineStalled, EngineUnavailable, GenerationFailed
from orchestrator.records import Sample, SampleStatus
from tests.support.engine_pools import DEADLINE_S, running_pool
from tests.support.engine_time import JUMPING

PROMPT = list(b"add these: 12+30=")
FOR_EVER = 1_000_000
"""Retries that are never used up."""

TICK_S = 0.0001
"""Shorter than anything that an engine does."""

LONG_S = 100_000.0
"""Of the jumping clock. An engine alone that fails and hangs is given rests of half a minute."""

FAULTS = st.floats(0, 0.3)


class Watched(ScriptedEngine):
    """A scripted engine that can be switched off, and that notes who came, in what order, and how many at once."""

    def __init__(self, *, is_up: bool = True, **how: Any) -> None:
        super().__init__(**how)
        self.is_up = is_up
        self.now = 0
        self.most = 0
        self.asked: list[GenerationRequest] = []
        self.was_missed = anyio.Event()
        """Set by the second probe of an engine that is off: by then the first one has been taken note of."""
        self._missed = 0

    async def probe(self) -> EngineInfo:
        if not self.is_up:
            self._missed += 1
            if self._missed > 1:
                self.was_missed.set()
            raise EngineUnavailable(self.name, "switched off")
        return await super().probe()

    async def generate(self, request: GenerationRequest, sink: TokenSink) -> GenerationEnd:
        self.asked.append(request)
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            if not self.is_up:
                raise EngineUnavailable(self.name, "switched off")
            return await super().generate(request, sink)
        finally:
            self.now -= 1


class Foreign(ScriptedEngine):
    """An engine of another vocabulary."""

    async def tokenize(self, text: str) -> list[int]:
        return [token + 1 for token in await super().tokenize(text)]


@pytest.fixture
def anyio_backend() -> tuple[str, Any]:
    """Waits cost nothing: no test here has a socket, a file or a thread."""
    return ("asyncio", dict(JUMPING))


def params(n: int = 60, **more: Any) -> SamplingParams:
    return SamplingParams(max_new_tokens=n, **more)


def engines_of(count: int = 2, **how: Any) -> list[Watched]:
    defaults = {"tokens_per_s": 20_000.0, "first_token_s": 0.0002, "length": (1, 60), "chunk": 4, "max_in_flight": 3}
    return [Watched(name=f"engine {i}", **{**defaults, **how}) for i in range(count)]


def assert_whole(sample: Sample, prompt: Sequence[int], sampling: SamplingParams, engine: ScriptedEngine) -> None:
    tokens, logprobs = engine.expected_response(prompt, sampling, sample.index)
    assert list(sample.tokens) == tokens
    assert sample.logprobs is not None
    assert list(sample.logprobs) == pytest.approx(logprobs, abs=1e-6)
    assert sample.status is (SampleStatus.COMPLETED if tokens[-1] == 256 else SampleStatus.TRUNCATED)
    assert sample.finish_reason == ("stop" if tokens[-1] == 256 else "length")
    assert sample.text == bytes(token for token in tokens if token < 256).decode()
    assert sum(count for _, count in sample.versions) == len(tokens)
    versions = [version for version, _ in sample.versions]
    assert versions == sorted(set(versions))


def assert_no_slot_is_taken(pool: EnginePool, engines: Sequence[Watched]) -> None:
    assert pool.in_flight == 0
    assert pool.waiting == 0
    assert [member.in_flight for member in pool.statistics()] == [0] * len(engines)
    assert [engine.now for engine in engines] == [0] * len(engines)
    assert all(engine.most <= engine.max_in_flight for engine in engines)


# -- whatever happens -------------------------------------------------------------------------------------------------


@given(
    failure=FAULTS,
    reset=FAULTS,
    hang=st.sampled_from([0.0, 0.0, 0.1]),
    chunk_tokens=st.sampled_from([None, 1, 3, 7, 50]),
    keep_partials=st.booleans(),
    seed=st.integers(0, 1 << 30),
)
@settings(max_examples=20)
async def test_every_sample_ends_once_and_whole(
    failure: float, reset: float, hang: float, chunk_tokens: int | None, keep_partials: bool, seed: int
) -> None:
    draw = random.Random(seed)
    engines = engines_of(draw.randint(1, 3), failure_rate=failure, reset_rate=reset, hang_rate=hang)
    samples = [Sample(index=i) for i in range(16)]
    version, ended = 0, 0

    async def one(pool: EnginePool, sample: Sample) -> None:
        nonlocal ended
        await pool.generate(sample, PROMPT, params())
        ended += 1

    async def disturb(pool: EnginePool) -> None:
        nonlocal version
        for _ in range(12):
            await anyio.sleep(draw.random() * 0.01)
            if draw.random() < 0.3:
                pool.pause()
                pool.interrupt()
                await pool.quiet()
                assert pool.in_flight == 0
                version += 1
                pool.resume()
            elif draw.random() < 0.5:
                pool.interrupt()
            else:
                version += 1

    how = {"chunk_tokens": chunk_tokens, "keep_partials": keep_partials, "seed": seed, "stall_s": 0.1}
    async with running_pool(*engines, max_retries=FOR_EVER, policy_version=lambda: version, **how) as pool:
        with anyio.fail_after(LONG_S):
            async with anyio.create_task_group() as tasks:
                for sample in samples:
                    tasks.start_soon(one, pool, sample)
                tasks.start_soon(disturb, pool)
        assert_no_slot_is_taken(pool, engines)
        received = sum(member.tokens for member in pool.statistics())
    assert ended == len(samples)
    for sample in samples:
        assert_whole(sample, PROMPT, params(), engines[0])
    kept = sum(len(sample.tokens) for sample in samples)
    assert received == kept if keep_partials else received >= kept


@given(seed=st.integers(0, 1 << 30))
@settings(max_examples=10)
async def test_a_sample_that_is_cancelled_leaves_no_slot_taken_and_keeps_its_tokens(seed: int) -> None:
    draw = random.Random(seed)
    engines = engines_of(2, max_in_flight=2, failure_rate=0.1)
    samples = [Sample(index=i) for i in range(12)]

    async def one(pool: EnginePool, sample: Sample) -> None:
        with anyio.move_on_after(draw.random() * 0.02):
            await pool.generate(sample, PROMPT, params())

    async with running_pool(*engines, chunk_tokens=8, max_retries=FOR_EVER) as pool:
        with anyio.fail_after(DEADLINE_S):
            async with anyio.create_task_group() as tasks:
                for sample in samples:
                    tasks.start_soon(one, pool, sample)
            assert_no_slot_is_taken(pool, engines)
            for sample in samples:  # slots are free and partial rollouts go on
                tokens, _ = engines[0].expected_response(PROMPT, params(), sample.index)
                assert list(sample.tokens) == tokens[: len(sample.tokens)]
                await pool.generate(sample, PROMPT, params())
                assert list(sample.tokens) == tokens
        assert_no_slot_is_taken(pool, engines)


async def test_no_engine_gets_more_than_it_takes() -> None:
    engines = engines_of(2, max_in_flight=3)
    async with running_pool(*engines) as pool, anyio.create_task_group() as tasks:
        for i in range(30):
            tasks.start_soon(pool.generate, Sample(index=i), PROMPT, params())
    assert [engine.most for engine in engines] == [3, 3]


# -- failures ---------------------------------------------------------------------------------------------------------


async def test_retries_in_a_row_without_a_token_are_used_up() -> None:
    (engine,) = engines_of(1, failure_rate=1.0)
    sample = Sample(index=0)
    async with running_pool(engine, max_retries=3) as pool:
        with anyio.fail_after(DEADLINE_S), pytest.raises(GenerationFailed) as caught:
            await pool.generate(sample, PROMPT, params())
        assert_no_slot_is_taken(pool, [engine])
    assert isinstance(caught.value.__cause__, EngineUnavailable)
    assert sample.status is SampleStatus.FAILED
    assert len(engine.asked) == 4
    assert [asked.attempt for asked in engine.asked] == [0, 1, 2, 3]


async def test_a_new_token_gives_the_retries_back() -> None:
    (engine,) = engines_of(1, reset_rate=0.8, chunk=1, length=(60, 60))
    sample = Sample(index=0)
    async with running_pool(engine, max_retries=3, chunk_tokens=8) as pool:
        with anyio.fail_after(DEADLINE_S):
            await pool.generate(sample, PROMPT, params())
        (statistics,) = pool.statistics()
    assert_whole(sample, PROMPT, params(), engine)
    assert statistics.failed > 2 * 3


async def test_a_stall_goes_on_elsewhere() -> None:
    hanging, well = *engines_of(1, hang_rate=1.0), Watched(name="well", time_scale=0, length=(1, 60), chunk=4)
    sample = Sample(index=3)
    async with running_pool(hanging, well, stall_s=0.1, max_retries=1) as pool:
        with anyio.fail_after(DEADLINE_S):
            await pool.generate(sample, PROMPT, params())
            while not hanging.asked:  # the first choice is the pool's
                sample = Sample(index=sample.index + 1)
                await pool.generate(sample, PROMPT, params())
        assert sum(member.stalled for member in pool.statistics()) == len(hanging.asked)
    assert_whole(sample, PROMPT, params(), well)


async def test_stalls_use_up_the_retries() -> None:
    (engine,) = engines_of(1, hang_rate=1.0, chunk=60, length=(60, 60))
    async with running_pool(engine, stall_s=0.02, max_retries=2) as pool:
        with anyio.fail_after(DEADLINE_S), pytest.raises(GenerationFailed) as caught:
            await pool.generate(Sample(index=0), PROMPT, params())
    assert isinstance(caught.value.__cause__, EngineStalled)
    assert len(engine.asked) == 3


async def test_a_refused_sample_is_not_tried_again() -> None:
    engines = engines_of(2, reject_rate=1.0)
    sample = Sample(index=0)
    async with running_pool(*engines) as pool:
        with pytest.raises(GenerationFailed) as caught:
            await pool.generate(sample, PROMPT, params())
        assert_no_slot_is_taken(pool, engines)
        assert [member.state for member in pool.statistics()] == ["up", "up"]
    assert isinstance(caught.value.__cause__, EngineRejected)
    assert sum(len(engine.asked) for engine in engines) == 1
    assert sample.status is SampleStatus.FAILED


async def test_waiting_for_an_engine_uses_up_no_retries() -> None:
    engines = engines_of(2, is_up=False)
    sample = Sample(index=0)
    async with running_pool(*engines, max_retries=0) as pool, anyio.create_task_group() as tasks:
        tasks.start_soon(pool.generate, sample, PROMPT, params())
        await anyio.wait_all_tasks_blocked()
        assert pool.waiting == 1
        assert [member.state for member in pool.statistics()] == ["down", "down"]
        assert pool.statistics()[0].last_error == "engine engine 0: switched off"
        engines[1].is_up = True
    assert_whole(sample, PROMPT, params(), engines[0])
    assert not engines[0].asked


async def test_an_engine_that_dies_and_comes_back_is_used_again() -> None:
    (engine,) = engines_of(1, length=(60, 60))
    sample = Sample(index=0)
    async with running_pool(engine, max_retries=FOR_EVER, chunk_tokens=10) as pool, anyio.create_task_group() as tasks:
        tasks.start_soon(pool.generate, sample, PROMPT, params())
        with anyio.fail_after(DEADLINE_S):
            while len(sample.tokens) < 20:  # noqa: ASYNC110 - the clock jumps
                await anyio.sleep(TICK_S)
            engine.is_up = False
            await engine.was_missed.wait()
            assert not sample.is_finished
            assert pool.statistics()[0].state == "down"
            engine.is_up = True
    assert_whole(sample, PROMPT, params(), engine)


async def test_engines_of_different_vocabularies_stop_the_pool() -> None:
    with pytest.raises(ExceptionGroup) as caught:
        async with running_pool(ScriptedEngine(name="one"), Foreign(name="other")):
            await anyio.sleep_forever()
    error = caught.value
    while isinstance(error, ExceptionGroup):
        assert len(error.exceptions) == 1
        error = error.exceptions[0]  # type: ignore[assignment]
    assert isinstance(error, EngineError)
    assert "one" in str(error)
    assert "other" in str(error)


# -- order ------------------------------------------------------------------------------------------------------------


async def test_continuations_come_before_fresh_prompts() -> None:
    (engine,) = engines_of(1, max_in_flight=1, length=(60, 60))
    partials = []
    for index in (10, 11):
        tokens, logprobs = engine.expected_response(PROMPT, params(), index)
        partials.append(Sample(index=index))
        partials[-1].extend(tokens[:9], logprobs[:9], 0)
    async with running_pool(engine) as pool:
        pool.pause()
        async with anyio.create_task_group() as tasks:
            for sample in [Sample(index=0), Sample(index=1), *partials]:
                tasks.start_soon(pool.generate, sample, PROMPT, params())
                await anyio.wait_all_tasks_blocked()
            assert pool.waiting == 4
            pool.resume()
    assert [asked.sample_index for asked in engine.asked] == [10, 11, 0, 1]
    for sample in partials:
        assert_whole(sample, PROMPT, params(), engine)


# -- interruption -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_partials", [True, False])
async def test_an_interrupted_sample_goes_on_or_begins_anew(keep_partials: bool) -> None:
    (engine,) = engines_of(1, length=(60, 60), tokens_per_s=2000)
    sample, version = Sample(index=0), 0
    async with (
        running_pool(engine, keep_partials=keep_partials, policy_version=lambda: version) as pool,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(pool.generate, sample, PROMPT, params())
        with anyio.fail_after(DEADLINE_S):
            while len(sample.tokens) < 12:  # noqa: ASYNC110 - the clock jumps
                await anyio.sleep(TICK_S)
            assert pool.interrupt() == 1
        got = len(sample.tokens)
        version = 1
    assert_whole(sample, PROMPT, params(), engine)
    assert [asked.generated for asked in engine.asked] == [0, got if keep_partials else 0]
    assert sample.versions == ([[0, got], [1, 60 - got]] if keep_partials else [[1, 60]])
    assert pool.statistics()[0].interrupted == 1
    assert pool.statistics()[0].failed == 0


async def test_while_paused_and_quiet_nothing_is_sent() -> None:
    engines = engines_of(2, length=(60, 60))
    samples = [Sample(index=i) for i in range(20)]
    async with running_pool(*engines, chunk_tokens=4) as pool, anyio.create_task_group() as tasks:
        for sample in samples:
            tasks.start_soon(pool.generate, sample, PROMPT, params())
        with anyio.fail_after(DEADLINE_S):
            while pool.in_flight < 6:  # noqa: ASYNC110 - the clock jumps
                await anyio.sleep(TICK_S)
            pool.pause()
            pool.interrupt()
            await pool.quiet()
        sent = sum(len(engine.asked) for engine in engines)
        gained = sum(len(sample.tokens) for sample in samples)
        await anyio.wait_all_tasks_blocked()
        assert pool.in_flight == 0
        assert sum(len(engine.asked) for engine in engines) == sent
        assert sum(len(sample.tokens) for sample in samples) == gained
        assert pool.waiting == len(samples)
        pool.resume()
    for sample in samples:
        assert_whole(sample, PROMPT, params(), engines[0])


async def test_hooks_see_every_piece_and_the_prompt_may_begin_anew() -> None:
    (engine,) = engines_of(1, length=(60, 60), time_scale=0)
    sample, before, after = Sample(index=0), [], []

    def before_piece(sample: Sample) -> None:
        if len(sample.tokens) == 20 and len(before) < 4:
            sample.clear()
        before.append(len(sample.tokens))

    async def after_piece(sample: Sample) -> None:
        after.append(len(sample.tokens))

    async with running_pool(engine, chunk_tokens=20) as pool:
        await pool.generate(sample, PROMPT, params(), before_piece=before_piece, after_piece=after_piece)
    assert before == [0, 0, 0, 0, 20, 40]
    assert after == [20, 20, 20, 20, 40]
    assert_whole(sample, PROMPT, params(), engine)
