"""Faults of the wire, the same for every adapter that speaks HTTP: typed errors, with what came kept."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import pytest

from orchestrator.engines import Engine, SamplingParams
from orchestrator.engines.http import client as http_module
from orchestrator.engines.http import events as events_module
from orchestrator.engines.openai import vllm_pause
from orchestrator.errors import EngineError, EngineRejected, EngineStalled, EngineUnavailable, GenerationFailed
from orchestrator.records import Sample, SampleStatus
from tests.support.engine_pools import DEADLINE_S, Got, running_pool
from tests.support.http_faults import SILENCE, FaultServer, Reply, answer, event, fault_server, stream
from tests.support.wires import MESSAGES, PROMPT, WIRES, Wire

ABC = [97, 98, 99]


@pytest.fixture(params=WIRES, ids=lambda wire: wire.name)
def wire(request: pytest.FixtureRequest) -> Wire:
    wire: Wire = request.param
    return wire


@asynccontextmanager
async def engine_on(
    wire: Wire, *generations: Reply, probed: bool = False, **others: Reply
) -> AsyncIterator[tuple[Engine, FaultServer]]:
    async with fault_server(**wire.replies(*generations, probed=probed) | others) as server:
        engine = wire.make(server.url)
        try:
            yield engine, server
        finally:
            await engine.aclose()


async def failure_of(wire: Wire, engine: Engine, got: Got) -> EngineError:
    with anyio.fail_after(DEADLINE_S), pytest.raises(EngineError) as caught:
        await engine.generate(wire.request(), got.sink)
    return caught.value


def assert_kept(wire: Wire, got: Got) -> None:
    """The three tokens that came before the fault, or their text."""
    assert got.text == "abc"
    assert got.tokens == ([] if wire.text_only else ABC)
    assert got.logprobs == ([] if wire.text_only else [-0.5] * 3)


def whole(wire: Wire) -> Reply:
    return stream([*wire.events_of(ABC), b"[DONE]"])


def begun(wire: Wire) -> list[object]:
    """The events of a response but for the last."""
    return wire.events_of(ABC)[:-1]


async def test_a_proper_stream_is_understood(wire: Wire) -> None:
    """So that the faults below are the only thing that is wrong."""
    got = Got()
    async with engine_on(wire, whole(wire)) as (engine, server):
        end = await engine.generate(wire.request(), got.sink)
        assert server.count(wire.path) == 1
    assert_kept(wire, got)
    assert (end.reason, end.text_complete) == ("stop", True)


async def test_bytes_that_are_no_utf_8_spoil_an_event_wherever_they_are(wire: Wire) -> None:
    """Also in a key that nobody would read: it may have been one that somebody reads."""
    last = json.dumps(wire.events_of(ABC)[-1]).encode()
    spoilt = b'{"choi\x80es": [], ' + last[1:]
    async with engine_on(wire, stream([*begun(wire), spoilt, b"[DONE]"])) as (engine, _):
        error = await failure_of(wire, engine, Got())
    assert isinstance(error, EngineUnavailable)


# -- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422])
async def test_a_4xx_answer_is_a_refusal_with_the_servers_words(wire: Wire, status: int) -> None:
    reply = answer({"error": {"code": status, "message": "the context is too small", "type": "x"}}, status)
    async with engine_on(wire, reply) as (engine, server):
        error = await failure_of(wire, engine, got := Got())
        assert server.count(wire.path) == 1, "adapters do not retry"
    assert isinstance(error, EngineRejected)
    assert "the context is too small" in error.message
    assert str(status) in error.message
    assert "faulty" in error.message
    assert got.text == ""


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 302, 204])
async def test_any_other_answer_makes_it_unavailable(wire: Wire, status: int) -> None:
    reply = answer(b"" if status in (204, 302) else {"error": "not now"}, status)
    async with engine_on(wire, reply) as (engine, server):
        error = await failure_of(wire, engine, Got())
        assert server.count(wire.path) == 1, "adapters do not retry"
    assert type(error) is EngineUnavailable
    assert str(status) in error.message


SHAPES = [b"", b"<html>no</html>", b"[1]", b'"text"', b"null", b'{"error": null}', b"\xff\xfe" * 9000]


@pytest.mark.parametrize("body", SHAPES)
@pytest.mark.parametrize("status", [400, 500])
async def test_an_error_answer_of_any_shape_keeps_its_kind(wire: Wire, status: int, body: bytes) -> None:
    async with engine_on(wire, answer(body, status)) as (engine, _):
        error = await failure_of(wire, engine, Got())
    assert type(error) is (EngineRejected if status < 500 else EngineUnavailable)
    assert len(error.message) < 5000


async def test_a_refused_connection_makes_it_unavailable(wire: Wire) -> None:
    async with fault_server() as server:
        pass
    engine = wire.make(server.url)
    assert isinstance(await failure_of(wire, engine, Got()), EngineUnavailable)
    with pytest.raises(EngineUnavailable):
        await engine.probe()
    await engine.aclose()


# -- streams ----------------------------------------------------------------------------------------------------------


def broken(wire: Wire, fault: str) -> Reply:
    """The three tokens, then this."""
    events, last = begun(wire), wire.events_of(ABC)[-1]
    match fault:
        case "reset":
            return stream(events, then="reset")
        case "ends without an end":
            return stream(events)
        case "cut in half":
            return Reply(stream(events).body + event(last)[:20])
        case "shorter than declared":
            return stream(events, length=100_000)
        case "garbage":
            return stream([*events, b"{nonsense"])
        case "not UTF-8":
            return stream([*events, b'{"text": "\xff\xfe", "content": "\xff", "choices": [{"text": "\xff"}]}'])
        case "not an object":
            return stream([*events, [1, 2]])
        case "an error":
            return stream([*events, wire.error_of(500, "out of memory")])
        case "an error line":
            return Reply(stream(events).body + b'error: {"message": "out of memory"}\n\n')
    assert fault == "done too early"
    return stream([*events, b"[DONE]"])


FAULTS = [
    "reset",
    "ends without an end",
    "cut in half",
    "shorter than declared",
    "garbage",
    "not UTF-8",
    "not an object",
    "an error",
    "an error line",
    "done too early",
]


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_broken_stream_makes_it_unavailable_and_keeps_what_came(wire: Wire, fault: str) -> None:
    async with engine_on(wire, broken(wire, fault)) as (engine, server):
        error = await failure_of(wire, engine, got := Got())
        assert server.count(wire.path) == 1, "adapters do not retry"
    assert type(error) is EngineUnavailable
    assert_kept(wire, got)


async def test_an_error_event_of_a_stream_keeps_its_kind(wire: Wire) -> None:
    refusal = stream([*begun(wire), wire.error_of(400, "the context is full")])
    async with engine_on(wire, refusal) as (engine, _):
        error = await failure_of(wire, engine, got := Got())
    assert isinstance(error, EngineRejected)
    assert "the context is full" in error.message
    assert_kept(wire, got)


async def test_a_line_that_never_ends_is_given_up(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events_module, "MAX_LINE_BYTES", 1 << 18)
    async with engine_on(wire, Reply(b"data: " + b"x" * 65536, then="repeat")) as (engine, _):
        error = await failure_of(wire, engine, Got())
    assert type(error) is EngineUnavailable
    assert "more than" in error.message


async def test_leaving_a_stream_closes_its_connection(wire: Wire) -> None:
    async with engine_on(wire, stream(begun(wire), then="hang")) as (engine, server):
        with anyio.CancelScope() as scope:
            await engine.generate(wire.request(), lambda *_: scope.cancel())
        assert scope.cancelled_caught
        with anyio.fail_after(DEADLINE_S):
            await server.empty()


async def test_closing_ends_what_is_under_way(wire: Wire) -> None:
    async with engine_on(wire, stream(begun(wire), then="hang")) as (engine, _):
        came, got = anyio.Event(), Got()

        async def generate() -> None:
            with pytest.raises(EngineUnavailable, match="closed"):
                await engine.generate(wire.request(), lambda *given: (got.sink(*given), came.set())[0])

        with anyio.fail_after(DEADLINE_S):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(generate)
                await came.wait()
                await engine.aclose()
        assert got.text.startswith("a")


# -- probes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["never ends", "wrong", "500", "reset"])
async def test_a_probe_that_fails_makes_it_unavailable(wire: Wire, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_module, "MAX_ANSWER_BYTES", 1 << 18)
    reply = {
        "never ends": Reply(b" " * 65536, then="repeat"),
        "wrong": answer([1]),
        "500": answer({}, 500),
        "reset": Reply(b"{", length=100, then="reset"),
    }[how]
    path = "props" if wire.name == "llamacpp" else "v1/models"
    async with engine_on(wire, whole(wire), **{path: reply}) as (engine, _):
        with pytest.raises(EngineUnavailable), anyio.fail_after(DEADLINE_S):
            await engine.probe()


# -- through the pool -------------------------------------------------------------------------------------------------

SAMPLING = SamplingParams(max_new_tokens=16)


@pytest.fixture(autouse=True)
def quick_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_pause, "PAUSE_CHECK_INTERVAL_S", 0.05)


def assert_whole(wire: Wire, sample: Sample, tokens: list[int]) -> None:
    assert sample.status is SampleStatus.COMPLETED
    assert sample.text == bytes(tokens).decode() if wire.text_only else True
    assert list(sample.tokens) == ([] if wire.text_only else tokens)


async def generate(pool: object, sample: Sample) -> None:
    with anyio.fail_after(DEADLINE_S):
        await pool.generate(sample, PROMPT, SAMPLING, messages=MESSAGES)  # type: ignore[attr-defined]


@pytest.mark.parametrize("fault", [*FAULTS, "silence", "stall", "500"])
async def test_a_sample_goes_on_after_any_fault(wire: Wire, fault: str) -> None:
    """From its tokens, where there are any; text alone begins anew."""
    faults = {"silence": SILENCE, "stall": stream(begun(wire), then="hang"), "500": answer({}, 500)}
    before = 0 if fault in ("silence", "500") or wire.text_only else 3
    rest = stream(wire.events_of([100]))
    async with (
        engine_on(wire, faults.get(fault) or broken(wire, fault), rest, probed=True) as (engine, server),
        running_pool(engine, stall_s=0.3) as pool,
    ):
        sample = Sample(index=0)
        await generate(pool, sample)
        asked = [body for path, body in server.requests if path == wire.path][1 if wire.drawn else 0 :]
        assert len(asked) == 2
        if not wire.text_only:
            assert wire.asked_tokens(asked[1]) == [*PROMPT, *ABC[:before]]
        assert pool.statistics()[0].stalled == (fault in ("silence", "stall"))
    assert_whole(wire, sample, [*ABC[:before], 100])


async def test_stalling_alone_uses_up_the_retries(wire: Wire) -> None:
    async with (
        engine_on(wire, SILENCE, probed=True) as (engine, _),
        running_pool(engine, stall_s=0.05, max_retries=1) as pool,
    ):
        with pytest.raises(GenerationFailed) as caught:
            await generate(pool, Sample(index=0))
    assert isinstance(caught.value.__cause__, EngineStalled)


async def test_a_request_that_drips_for_ever_ends_at_its_timeout(wire: Wire) -> None:
    drip = Reply(b": still here\n\n", then="repeat")
    async with (
        engine_on(wire, drip, probed=True) as (engine, _),
        running_pool(engine, request_timeout_s=0.2, stall_s=0.2, max_retries=0) as pool,
    ):
        with pytest.raises(GenerationFailed) as caught:
            await generate(pool, Sample(index=0))
    assert isinstance(caught.value.__cause__, EngineStalled)


async def test_a_refused_sample_fails_at_once_with_the_refusal_as_cause(wire: Wire) -> None:
    refusal = answer({"error": {"message": "the context is too small"}}, 400)
    async with engine_on(wire, refusal, probed=True) as (engine, server), running_pool(engine) as pool:
        before = server.count(wire.path)
        with pytest.raises(GenerationFailed, match="too small") as caught:
            await generate(pool, Sample(index=0))
        assert server.count(wire.path) == before + 1
    assert isinstance(caught.value.__cause__, EngineRejected)
