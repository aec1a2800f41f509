"""Reward servers, on real sockets: what is asked, what may be answered, and what each fault becomes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

from orchestrator.errors import RewardError, RewardTimeout
from orchestrator.records import Prompt, Sample, SampleStatus
from orchestrator.rewards import Reward, RewardResult, RewardUnavailable
from orchestrator.rewards.http import reward as http
from tests.rewards.test_builtin import score
from tests.support.http_faults import SILENCE, FaultServer, Reply, answer, fault_server
from tests.support.specs import build_reward


def finished(index: int, text: str, status: SampleStatus = SampleStatus.COMPLETED) -> Sample:
    sample = Sample(index=index, text=text, status=status, finish_reason="stop")
    sample.extend([1] * len(text), [0.0] * len(text), 0)
    return sample


PROMPT = Prompt("sums", 17, 2, "2+2=", "4", {"level": 1})


@asynccontextmanager
async def served(*replies: Reply, **options: Any) -> AsyncIterator[tuple[FaultServer, Reward]]:
    async with fault_server(score=replies) as server:
        reward = build_reward(kind="http", url=f"{server.url}/score", **options)
        try:
            yield server, reward
        finally:
            await reward.aclose()


# -- what is asked and answered ---------------------------------------------------------------------------------------


async def test_a_request_has_what_servers_of_slime_are_asked_and_more() -> None:
    async with served(answer(0.5)) as (server, reward):
        assert await score(reward, finished(136, "It is 4."), PROMPT) == RewardResult(0.5)
        assert server.requests == [
            (
                "/score",
                {
                    "prompt": "2+2=",
                    "response": "It is 4.",
                    "label": "4",
                    "metadata": {"level": 1},
                    "source": "sums",
                    "prompt_index": 17,
                    "epoch": 2,
                    "index": 136,
                    "status": "completed",
                    "finish_reason": "stop",
                    "response_tokens": 8,
                },
            )
        ]
        statistics = reward.statistics()
        assert (statistics.name, statistics.kind, statistics.scored) == (f"{server.url}/score", "http", 1)


async def test_a_prompt_of_token_ids_is_sent_as_such() -> None:
    async with served(answer(1)) as (server, reward):
        await score(reward, finished(0, "x"), Prompt("ids", 0, 0, None, None, {}, [5, 6]))
        asked = server.requests[0][1]
        assert (asked["prompt"], asked["prompt_tokens"]) == (None, [5, 6])


async def test_a_group_is_one_request() -> None:
    async with served(answer([1, 0.5, 0]), group=True) as (server, reward):
        samples = [finished(8, "a"), finished(9, "bc", SampleStatus.TRUNCATED), finished(10, "")]
        assert await reward.score(samples, PROMPT) == [RewardResult(1.0), RewardResult(0.5), RewardResult(0.0)]
        ((_, asked),) = server.requests
        assert asked["samples"] == [
            {
                "response": sample.text,
                "index": sample.index,
                "status": str(sample.status),
                "finish_reason": "stop",
                "response_tokens": len(sample.tokens),
            }
            for sample in samples
        ]
        assert "response" not in asked
        assert asked["prompt"] == "2+2="


@pytest.mark.parametrize(
    ("options", "said", "expected"),
    [
        ({}, 1, [(1.0, None)]),
        ({}, True, [(1.0, None)]),
        ({"key": "score"}, {"score": 0.25, "why": "x"}, [(0.25, {"score": 0.25, "why": "x"})]),
        ({"key": "rewards", "group": True}, {"rewards": [0.5, 1]}, [(0.5, None), (1.0, None)]),
        ({"key": "r", "group": True}, [{"r": 1}, {"r": 0}], [(1.0, {"r": 1}), (0.0, {"r": 0})]),
    ],
)
async def test_answers(options: dict[str, Any], said: Any, expected: Any) -> None:
    async with served(answer(said), **options) as (_, reward):
        samples = [finished(n, "x") for n in range(len(expected))]
        assert [(r.value, r.detail) for r in await reward.score(samples, PROMPT)] == expected


@pytest.mark.parametrize(
    ("options", "said", "message"),
    [
        ({}, None, "of type NoneType; expected a number"),
        ({}, "0.5", "of type str; expected a number"),
        ({}, [0.5], "of type list; expected a number"),
        ({}, {"score": 1}, "set `key` to the one of 'score'"),
        ({"key": "reward"}, {"score": 1}, "without the key 'reward'; its keys: 'score'"),
        ({}, b"NaN", "is not JSON"),
        ({}, b"", "is not JSON"),
        ({}, b"<html>", "is not JSON"),
        ({"group": True}, [1, 2], "returned 2 rewards for 1 samples"),
        ({"group": True}, 1, "for a group it must return a list of 1 rewards"),
    ],
)
async def test_wrong_answers_are_errors_and_never_a_number(options: dict[str, Any], said: Any, message: str) -> None:
    async with served(answer(said), **options) as (server, reward):
        with pytest.raises(RewardError, match=message) as caught:
            await reward.score([finished(0, "x")], PROMPT)
        assert type(caught.value) is RewardError
        assert str(caught.value).startswith(f"reward {server.url}/score: ")
        assert reward.statistics().failed == 1


async def test_a_key_of_the_environment_is_sent_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="JUDGE_KEY has no key"):
        build_reward(kind="http", url="http://127.0.0.1:1/x", api_key_env="JUDGE_KEY")
    monkeypatch.setenv("JUDGE_KEY", "s3cret")
    heads: list[bytes] = []

    async def serve(client: Any) -> None:
        async with client:
            heads.append(await client.receive())
            await client.send(b"HTTP/1.1 401 X\r\nContent-Length: 2\r\nConnection: close\r\n\r\nno")

    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener, anyio.create_task_group() as tasks:
        port = listener.extra(anyio.abc.SocketAttribute.local_port)
        tasks.start_soon(listener.serve, serve)
        reward = build_reward(kind="http", url=f"http://127.0.0.1:{port}/x", api_key_env="JUDGE_KEY")
        with pytest.raises(RewardError, match="rejected the request: 401: no") as caught:
            await score(reward, finished(0, "x"), PROMPT)
        await reward.aclose()
        tasks.cancel_scope.cancel()
    assert b"\r\nAuthorization: Bearer s3cret\r\n" in heads[0]
    assert "s3cret" not in str(caught.value)


# -- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "kind", "message"),
    [
        (answer({"detail": "no prompt"}, 422), RewardError, "rejected the request: 422: .*no prompt"),
        (answer(b"", 404), RewardError, "rejected the request: 404: no message"),
        (answer(b"", 307), RewardError, "307; redirects are not followed"),
        (answer(b"x" * 100_000, 400), RewardError, "400: x{300}$"),
        (answer(b"busy", 429), RewardUnavailable, "answered 429: busy"),
        (answer(b"down", 503), RewardUnavailable, "answered 503: down"),
        (answer(b"oops", 500), RewardUnavailable, "answered 500: oops"),
        (Reply(b"", then="reset", status=0), RewardUnavailable, "reward http"),
        (Reply(b"", status=0), RewardUnavailable, "reward http"),
        (Reply(b"[1", length=9), RewardUnavailable, "reward http"),
        (Reply(b"[1", length=9, then="reset"), RewardUnavailable, "reward http"),
        (Reply(b"garbage\r\n\r\n", status=0), RewardUnavailable, "reward http"),
    ],
)
async def test_what_a_fault_becomes(reply: Reply, kind: type[RewardError], message: str) -> None:
    async with served(reply, answer(1)) as (server, reward):
        with pytest.raises(RewardError, match=message) as caught:
            await score(reward, finished(0, "x"), PROMPT)
        assert type(caught.value) is kind
        assert await score(reward, finished(0, "x"), PROMPT) == RewardResult(1.0)
        statistics = reward.statistics()
        away = kind is RewardUnavailable
        assert (statistics.unavailable, statistics.failed, statistics.in_a_row) == (away, not away, 0)
        assert statistics.last_failure == ("unavailable" if away else "failed")
        with anyio.fail_after(10):
            await server.empty()


async def test_nobody_listens() -> None:
    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener:
        url = f"http://127.0.0.1:{listener.extra(anyio.abc.SocketAttribute.local_port)}/x"
    reward = build_reward(kind="http", url=url)
    with pytest.raises(RewardUnavailable, match=url):
        await score(reward, finished(0, "x"), PROMPT)
    await reward.aclose()


@pytest.mark.parametrize(
    "reply", [SILENCE, Reply(b"[1", length=9, then="hang"), Reply(b"", status=500, length=9, then="hang")]
)
async def test_silence_ends_at_the_deadline_and_so_does_its_connection(reply: Reply) -> None:
    async with served(reply, answer(1), timeout_s=0.3) as (server, reward):
        with pytest.raises(RewardTimeout, match=r"no answer within 0.3 s; the connection was closed"):
            await score(reward, finished(0, "x"), PROMPT)
        with anyio.fail_after(10):
            await server.empty()
        assert reward.statistics().timed_out == 1


async def test_an_answer_without_end_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "MAX_ANSWER_BYTES", 100_000)
    async with served(Reply(b"1" * 10_000, then="repeat")) as (server, reward):
        with pytest.raises(RewardError, match="the answer has more than 100000 bytes"):
            await score(reward, finished(0, "x"), PROMPT)
        with anyio.fail_after(10):
            await server.empty()


async def test_what_cannot_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    async with served(answer(1)) as (server, reward):
        with pytest.raises(RewardError, match="cannot send the request"):
            await score(reward, finished(0, "x"), Prompt("s", 0, 0, "p", {1, 2}))
        monkeypatch.setattr(http, "MAX_REQUEST_BYTES", 1000)
        with pytest.raises(RewardError, match=r"the request has \d+ bytes; at most 1000"):
            await score(reward, finished(0, "x" * 1000), PROMPT)
        assert not server.requests


async def test_not_more_calls_than_concurrency_at_a_time() -> None:
    async with served(SILENCE, concurrency=3) as (server, reward), anyio.create_task_group() as tasks:
        for n in range(8):
            tasks.start_soon(score, reward, finished(n, "x"), PROMPT)
        with anyio.fail_after(10):
            while server.count("/score") < 3:
                await anyio.lowlevel.checkpoint()
        await anyio.wait_all_tasks_blocked()
        assert (reward.statistics().running, reward.statistics().extra["waiting"]) == (3, 5)
        assert server.open_connections == 3
        tasks.cancel_scope.cancel()


async def test_a_call_that_is_given_up_closes_its_connection() -> None:
    async with served(SILENCE) as (server, reward):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(score, reward, finished(0, "x"), PROMPT)
            with anyio.fail_after(10):
                while not server.requests:
                    await anyio.lowlevel.checkpoint()
            tasks.cancel_scope.cancel()
        with anyio.fail_after(10):
            await server.empty()
        statistics = reward.statistics()
        assert (statistics.running, statistics.failed, statistics.timed_out, statistics.unavailable) == (0, 0, 0, 0)
    with pytest.raises(RewardError, match="it was closed"):
        await score(reward, finished(0, "x"), PROMPT)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kind": "http"}, "a reward of kind http needs a url"),
        (
            {"kind": "http", "url": "http://127.0.0.1:1/x", "path": "contains"},
            "path is for functions, not for a reward of kind http",
        ),
        ({"path": "contains", "url": "http://127.0.0.1:1/x"}, "url is for servers"),
        ({}, "the reward has no path"),
    ],
)
def test_kinds_have_their_own_place(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build_reward(**options)


async def test_each_call_has_a_connection_of_its_own() -> None:
    """A server that keeps connections open may end them at any moment, also while the next request is on its way."""
    connections = 0

    async def serve(client: Any) -> None:
        nonlocal connections
        connections += 1
        async with client:
            try:
                while True:
                    request = await client.receive()
                    while not request.endswith(b"}"):
                        request += await client.receive()
                    await client.send(b"HTTP/1.1 200 X\r\nContent-Length: 1\r\n\r\n1")
            except anyio.EndOfStream:
                pass

    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener, anyio.create_task_group() as tasks:
        port = listener.extra(anyio.abc.SocketAttribute.local_port)
        tasks.start_soon(listener.serve, serve)
        reward = build_reward(kind="http", url=f"http://127.0.0.1:{port}/x")
        for _ in range(3):
            await score(reward, finished(0, "x"), PROMPT)
        await reward.aclose()
        tasks.cancel_scope.cancel()
    assert connections == 3
