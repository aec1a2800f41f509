"""The scripted engine: what it gives is a function of its seed and of what it is asked, never of time."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.engines import SamplingParams, ScriptedEngine
from orchestrator.engines.scripted.engine import END_OF_SEQUENCE, answer_of
from orchestrator.errors import EngineRejected, EngineUnavailable
from tests.support.engine_pools import Got, ask, request
from tests.support.engine_time import JUMPING

PROMPT = list(b"question: 12+30=")


@pytest.fixture
def anyio_backend() -> tuple[str, Any]:
    return ("asyncio", dict(JUMPING))


@given(
    seed=st.integers(0, 9),
    index=st.integers(0, 99),
    cuts=st.lists(st.integers(1, 20), min_size=1, max_size=20),
    chunk=st.integers(1, 20),
    stop=st.sampled_from([(), ("e",), ("the", "so ")]),
)
def test_a_response_is_the_same_however_it_is_cut(
    seed: int, index: int, cuts: list[int], chunk: int, stop: tuple[str, ...]
) -> None:
    engine = ScriptedEngine(name="e", seed=seed, length=(1, 80), tail_sigma=0.5, echo_rate=0.2, chunk=chunk)
    sampling: dict[str, Any] = {"max_new_tokens": 64, "stop": stop}
    expected = engine.expected_response(PROMPT, SamplingParams(**sampling), index)

    async def main() -> Got:
        whole, end = Got(), None
        for cut in [*cuts, *[20] * 10]:
            n = min(cut, 64 - len(whole.tokens))
            if end == "stop" or not n:
                break
            got = await ask(engine, request(PROMPT, generated=whole.tokens, n=n, index=index, **sampling))
            assert got.end is not None
            end = got.end.reason
            whole.sink(got.tokens, got.logprobs, "")
        return whole

    got = anyio.run(main, backend_options=dict(JUMPING))
    assert (got.tokens, got.logprobs) == expected


async def test_samples_of_one_prompt_differ_and_so_do_prompts_and_seeds() -> None:
    sampling = SamplingParams(max_new_tokens=40)
    responses = [
        tuple(ScriptedEngine(name="e", seed=seed).expected_response(prompt, sampling, index)[0])
        for seed in (0, 1)
        for prompt in (PROMPT, PROMPT[1:])
        for index in range(4)
    ]
    assert len(set(responses)) == len(responses)
    assert all(chr(token).islower() or token == 32 for response in responses for token in response)


async def test_lengths_are_drawn_as_asked_for() -> None:
    sampling = SamplingParams(max_new_tokens=1000)

    def lengths(**options: Any) -> list[int]:
        engine = ScriptedEngine(name="e", **options)
        return [len(engine.expected_response(PROMPT, sampling, index)[0]) for index in range(300)]

    even = lengths(length=(20, 60))
    assert (min(even), max(even)) == (20, 60)
    tail = sorted(lengths(length=(20, 60), tail_sigma=1.0))
    assert tail[150] == pytest.approx(40, rel=0.25)
    assert tail[-3] > 200
    assert set(lengths()) == {1000}


async def test_faults_come_at_their_rates_and_are_drawn_anew_for_each_attempt() -> None:
    engine = ScriptedEngine(
        name="e", failure_rate=0.2, reset_rate=0.2, hang_rate=0.2, reject_rate=0.2, tokens_per_s=1e6, chunk=1
    )

    async def outcome(index: int, attempt: int) -> str:
        got = Got()
        with anyio.move_on_after(5):
            try:
                await engine.generate(request(PROMPT, n=16, index=index, attempt=attempt), got.sink)
            except EngineRejected:
                return "reject"
            except EngineUnavailable:
                return "reset" if got.tokens else "failure"
            return "fine"
        return "hang"

    seen = [[await outcome(index, attempt) for index in range(100)] for attempt in (0, 1, 0)]
    assert seen[0] == seen[2] != seen[1]
    counts = Counter(seen[0] + seen[1])
    assert all(20 <= counts[name] <= 65 for name in ("fine", "reject", "hang", "reset", "failure")), counts


async def test_times_are_those_of_its_options_and_can_be_compressed() -> None:
    for scale in (1.0, 0.01):
        engine = ScriptedEngine(
            name="e", delay_s=1, first_token_s=2, tokens_per_s=10, chunk=5, time_scale=scale, length=(90, 90)
        )
        began = anyio.current_time()
        await engine.generate(request(PROMPT, n=50, max_new_tokens=50), Got().sink)
        assert anyio.current_time() - began == pytest.approx((1 + 2 + 5) * scale)


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [("what is 12+30=", "42"), ("1+2+3=", "6"), ("say yes", "yes"), ("a+b=", "a+b"), ("", ""), ("7?", "7")],
)
async def test_it_can_answer_prompts_that_a_reward_can_score(prompt: str, answer: str) -> None:
    assert answer_of(prompt) == answer
    engine = ScriptedEngine(name="e", echo_rate=1.0)
    got = await ask(engine, request(list(prompt.encode() or b" "), n=20))
    assert got.tokens == [*answer.encode(), END_OF_SEQUENCE]
    assert got.text == answer


async def test_some_responses_are_answers_and_some_are_not() -> None:
    engine, sampling = ScriptedEngine(name="e", echo_rate=0.5), SamplingParams(max_new_tokens=20)
    answers = sum(engine.expected_response(PROMPT, sampling, i)[0][:2] == list(b"42") for i in range(200))
    assert answers / 200 == pytest.approx(0.5, abs=4 * math.sqrt(0.25 / 200))
