"""Rewards of whole groups: one finite number for each sample, or an error for all of them."""

from __future__ import annotations

from array import array
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.concurrency.processes.messages import PREFIX
from orchestrator.errors import RewardError
from orchestrator.records import Prompt, Sample, SampleStatus
from orchestrator.rewards.wire import decode_call, encode_call
from tests.rewards.test_builtin import prompt_of, reward_of
from tests.support.specs import build_reward

KINDS = pytest.mark.parametrize("function", ["ranks", "ranks_async"])


def group_of(*texts: str) -> list[Sample]:
    return [Sample(index=n, text=text, status=SampleStatus.COMPLETED) for n, text in enumerate(texts)]


@KINDS
async def test_a_function_sees_all_samples_and_gives_each_its_reward(function: str) -> None:
    async with reward_of(function, group=True, key="score") as reward:
        assert reward.is_whole_group
        results = await reward.score(group_of("a", "abc", "ab"), prompt_of())
        assert [(result.value, result.detail) for result in results] == [(2.0, None), (0.0, None), (1.0, None)]
        assert reward.statistics().scored == 1


@KINDS
async def test_lists_arrays_and_dictionaries(function: str) -> None:
    good = {
        "ranks": [(2.0, None), (1.0, None), (1.0, None)],
        "array": [(0.5, None), (0.25, None), (0.0, None)],
        "tuple": [(1.0, None), (2.0, None), (3.0, None)],
        "dict": [(3.0, None), (2.0, None), (1.0, None)],
        "dicts": [(1.0, {"score": 1, "place": n}) for n in range(3)],
    }
    async with reward_of(function, group=True, key="score") as reward:
        for label, expected in good.items():
            results = await reward.score(group_of("", "", ""), prompt_of(label))
            assert [(result.value, result.detail) for result in results] == expected


@KINDS
async def test_everything_else_is_an_error_for_the_whole_group(function: str) -> None:
    bad = {
        "too few": "returned 2 rewards for 3 samples",
        "too many": "returned 4 rewards for 3 samples",
        "none": "for a group it must return a list of 3 rewards",
        "number": "for a group it must return a list of 3 rewards",
        "text": "of type str; for a group it must return a list",
        "dict of a number": "of type float; for a group it must return a list",
        "scalar array": "for a group it must return a list",
        "nan inside": "returned nan; expected a finite number",
        "text inside": "of type str; expected a number",
    }
    async with reward_of(function, group=True, key="score") as reward:
        for label, said in bad.items():
            with pytest.raises(RewardError, match=said):
                await reward.score(group_of("", "", ""), prompt_of(label))
        assert (reward.statistics().scored, reward.statistics().failed) == (0, len(bad))
        assert reward.statistics().extra.get("processes", 1) == 1


async def test_the_function_sees_the_whole_samples() -> None:
    samples = group_of("a", "b\u2028", "")
    samples[0].extend([1, 2, 3], [-0.5, -0.25, 0.0], 4)
    samples[1].extend([9], None, 5)
    samples[1].loss_mask, samples[2].metadata = b"\0", {"pieces": 2}
    prompt = Prompt("chat", 1, 2, None, [1], {"x": None}, array("i", [1, 2]))
    async with reward_of("whole_group", group=True, key="score") as reward:
        results = await reward.score(samples, prompt)
    assert [(result.detail or {})["sample"] for result in results] == [repr(sample) for sample in samples]
    assert (results[2].detail or {})["prompt"] == repr(prompt)


@pytest.mark.parametrize("name", ["exact_match", "contains", "math_verify", "reasoning_gym"])
def test_what_is_built_in_scores_each_sample_by_itself(name: str) -> None:
    with pytest.raises(ValueError, match="scores each sample separately"):
        build_reward(name, group=True)


SAMPLES = st.lists(
    st.tuples(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=5), st.booleans(), st.booleans(), st.text()),
    min_size=1,
    max_size=5,
)


@given(SAMPLES, st.none() | st.lists(st.integers(0, 2**31 - 1), max_size=4))
def test_calls_arrive_as_they_were_sent(drawn: Any, prompt_tokens: list[int] | None) -> None:
    samples = group_of(*(text for *_, text in drawn))
    for sample, (tokens, has_logprobs, has_mask, _) in zip(samples, drawn, strict=True):
        sample.extend(tokens, [0.5] * len(tokens) if has_logprobs else None, 3)
        sample.loss_mask = bytes(len(tokens)) if has_mask else None
    prompt = Prompt("s", 1, 2, None, "l", {}, None if prompt_tokens is None else array("i", prompt_tokens))
    message = encode_call(samples, prompt)
    header_bytes, _ = PREFIX.unpack_from(message)
    header = orjson.loads(message[PREFIX.size : PREFIX.size + header_bytes])
    assert decode_call(header, message[PREFIX.size + header_bytes :]) == (samples, prompt)
