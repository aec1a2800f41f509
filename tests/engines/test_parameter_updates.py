"""New parameters at each kind of engine: the order of the steps, what a failure leaves behind, and that it goes on."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import pytest

from orchestrator.engines import Engine, ParameterUpdate, SamplingParams, ScriptedEngine
from orchestrator.engines.embedded.child import SERVER
from orchestrator.engines.embedded.engine import EmbeddedEngine
from orchestrator.engines.embedded.tiny_model import write_tiny_model
from orchestrator.engines.http import parameters as weights
from orchestrator.engines.llamacpp.engine import LlamaCppEngine
from orchestrator.engines.openai.engine import OpenAIEngine
from orchestrator.engines.sglang.engine import SGLangEngine
from orchestrator.errors import EngineError, EngineRejected, EngineStalled, EngineUnavailable
from tests.support.engine_pools import DEADLINE_S, Got, ask, request, running_engine
from tests.support.fake_openai import FakeOpenAI, fake_openai
from tests.support.fake_server import FakeServer, until
from tests.support.fake_sglang import FakeSGLang, fake_sglang

PROMPT = list(b"Once upon a time")
LONG = 300
SGLANG_STEPS = ["/pause_generation", "/update_weights_from_disk", "/flush_cache", "/continue_generation"]
VLLM_STEPS = ["/pause", "/collective_rpc", "/reset_prefix_cache", "/resume"]


@asynccontextmanager
async def sglang_on(**how: Any) -> AsyncIterator[tuple[SGLangEngine, FakeSGLang]]:
    async with fake_sglang(**how) as server:
        engine = SGLangEngine(name="sg", url=server.url)
        async with running_engine(engine):
            yield engine, server
            server.released.set()


@asynccontextmanager
async def vllm_on(**how: Any) -> AsyncIterator[tuple[OpenAIEngine, FakeOpenAI]]:
    async with fake_openai(**how) as server:
        engine = OpenAIEngine(name="vl", url=server.url, dialect="vllm")
        async with running_engine(engine):
            yield engine, server
            server.released.set()


def on(kind: str, **how: Any) -> Any:
    return sglang_on(**how) if kind == "sglang" else vllm_on(**how)


def steps(server: FakeServer) -> list[str]:
    """The paths of the update, in the order in which they came."""
    known = {*SGLANG_STEPS, *VLLM_STEPS}
    return [path.partition("?")[0] for path, _ in server.posted if path.partition("?")[0] in known]


async def is_running(engine: Engine, server: FakeServer) -> None:
    """It generates."""
    assert server.resumed.is_set()
    server.hold_after = None
    got = await ask(engine, request(PROMPT, n=LONG, seed=3))
    assert got.tokens == server.script.expected_response(PROMPT, SamplingParams(max_new_tokens=LONG), 3)[0]


# -- the order of the steps -------------------------------------------------------------------------------------------


async def test_sglang_pauses_loads_and_goes_on() -> None:
    async with sglang_on() as (engine, server):
        assert (await engine.probe()).policy_version is None
        await engine.update_parameters(ParameterUpdate("new/weights", 7))
        assert server.posted[-3:] == [
            ("/pause_generation", {"mode": "abort"}),
            (
                "/update_weights_from_disk",
                {"model_path": "new/weights", "weight_version": "7", "flush_cache": True},
            ),
            ("/continue_generation", {}),
        ]
        info = await engine.probe()
        assert (info.model, info.policy_version) == ("new/weights", 7)
        assert not server.is_dead
        await is_running(engine, server)


async def test_vllm_pauses_loads_forgets_and_resumes() -> None:
    async with vllm_on() as (engine, server):
        await engine.update_parameters(ParameterUpdate("new/weights", 7))
        assert server.posted == [
            ("/pause?mode=abort", {}),
            ("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": "new/weights"}}),
            ("/reset_prefix_cache?reset_running_requests=true", {}),
            ("/resume", {}),
        ]
        assert server.weights == "new/weights"
        await is_running(engine, server)


@pytest.mark.parametrize("kind", ["sglang", "vllm 0.32", "vllm 0.33"])
async def test_requests_that_are_kept_go_on_to_their_end(kind: str) -> None:
    how = {"pause_status": 503} if kind == "vllm 0.33" else {}
    async with on(kind, **how) as (engine, server):
        server.hold_after, got = 6, Got()

        async def generate() -> None:
            got.end = await engine.generate(request(PROMPT, n=LONG, seed=2), got.sink)

        with anyio.fail_after(DEADLINE_S):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(generate)
                await until(lambda: len(got.tokens) >= 6)
                await engine.update_parameters(ParameterUpdate("new/weights", 8, keeps_requests=True))
                assert steps(server) == (SGLANG_STEPS if kind == "sglang" else VLLM_STEPS)
                server.released.set()
        assert got.tokens == server.script.expected_response(PROMPT, SamplingParams(max_new_tokens=LONG), 2)[0]
        assert got.end is not None
        assert got.end.reason == "stop"
        assert not getattr(server, "is_dead", False)
        assert server.posted[0] in [("/generate", server.requests[0]), ("/v1/completions", server.requests[0])]


async def test_an_older_sglang_that_cannot_pause_is_updated_all_the_same() -> None:
    async with sglang_on(can_pause=False) as (engine, server):
        await engine.update_parameters(ParameterUpdate("new/weights", 7))
        assert server.weight_version == "7"
        await is_running(engine, server)


# -- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["missing", "unlucky"])
async def test_what_sglang_refuses_is_said_in_its_words_and_changes_nothing(path: str) -> None:
    async with sglang_on(weight_version="3") as (engine, server):
        with pytest.raises(EngineRejected, match="Failed to update weights"):
            await engine.update_parameters(ParameterUpdate(path, 4))
        assert steps(server)[-1] == "/continue_generation"
        assert (await engine.probe()).policy_version == 3
        await is_running(engine, server)


async def test_a_reload_that_fails_in_vllm_leaves_unknown_parameters() -> None:
    async with vllm_on() as (engine, server):
        with pytest.raises(EngineUnavailable, match="no such directory"):
            await engine.update_parameters(ParameterUpdate("missing", 4))
        assert steps(server) == ["/pause", "/collective_rpc", "/resume"]
        await is_running(engine, server)


async def test_a_vllm_without_its_development_mode_is_told_what_to_set() -> None:
    async with vllm_on(dev_mode=False) as (engine, server):
        with pytest.raises(EngineRejected, match="VLLM_SERVER_DEV_MODE=1"):
            await engine.update_parameters(ParameterUpdate("new/weights", 4))
        await is_running(engine, server)


async def test_a_sglang_without_updates_is_told_what_to_do() -> None:
    async with sglang_on() as (engine, server):
        server.path_faults = {"/update_weights_from_disk": "404"}
        with pytest.raises(EngineRejected, match="set_policy_version"):
            await engine.update_parameters(ParameterUpdate("new/weights", 4))
        await is_running(engine, server)


ALL_STEPS = [("sglang", step) for step in SGLANG_STEPS] + [("vllm", step) for step in VLLM_STEPS]
LAST = {"/continue_generation", "/resume"}


@pytest.mark.parametrize(("kind", "step"), ALL_STEPS)
@pytest.mark.parametrize("fault", ["500", "reset"])
async def test_a_failure_of_any_step_is_no_success_and_the_server_goes_on(kind: str, step: str, fault: str) -> None:
    async with on(kind) as (engine, server):
        server.path_faults = {step: fault}
        with pytest.raises(EngineUnavailable) as caught:
            await engine.update_parameters(ParameterUpdate("new/weights", 5, keeps_requests=True))
        order = SGLANG_STEPS if kind == "sglang" else VLLM_STEPS
        assert steps(server) == [*order[: order.index(step) + 1], *([] if step in LAST else [order[-1]])]
        if step in LAST:
            assert "still be paused" in caught.value.message
        else:
            await is_running(engine, server)


@pytest.mark.parametrize(("kind", "step"), ALL_STEPS)
async def test_an_update_that_is_cancelled_at_any_step_leaves_a_server_that_goes_on(kind: str, step: str) -> None:
    async with on(kind) as (engine, server):
        server.path_faults = {step: "silence"}
        with anyio.fail_after(DEADLINE_S):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(engine.update_parameters, ParameterUpdate("new/weights", 5, True))
                await until(lambda: step in steps(server))
                server.path_faults = {}
                tasks.cancel_scope.cancel()
                if step in LAST:  # it is waited for, shielded; let it be answered
                    server.released.set()
        order = SGLANG_STEPS if kind == "sglang" else VLLM_STEPS
        assert steps(server)[-1] == order[-1]
        await is_running(engine, server)


@pytest.mark.parametrize(("kind", "step"), [("sglang", "/continue_generation"), ("vllm", "/resume")])
async def test_a_server_that_does_not_answer_is_not_waited_for_for_ever(
    kind: str, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "RESUME_DEADLINE_S", 0.05)
    async with on(kind) as (engine, server):
        server.path_faults = {step: "silence"}
        with anyio.fail_after(DEADLINE_S), pytest.raises(EngineUnavailable, match="still be paused"):
            await engine.update_parameters(ParameterUpdate("new/weights", 5))
        with anyio.move_on_after(0.5) as scope:
            scope.cancel()
            await engine.update_parameters(ParameterUpdate("new/weights", 5))
        assert scope.cancelled_caught


async def test_a_failure_and_a_server_that_stays_paused_are_both_told() -> None:
    async with sglang_on() as (engine, server):
        server.path_faults = {"/continue_generation": "500"}
        with pytest.raises(EngineUnavailable, match=r"still be paused.*no such file"):
            await engine.update_parameters(ParameterUpdate("missing", 5))


async def test_a_cache_that_was_not_forgotten_is_no_success() -> None:
    async with sglang_on() as (engine, server):
        server.path_faults = {"/flush_cache": "400"}
        with pytest.raises(EngineUnavailable, match="update it again"):
            await engine.update_parameters(ParameterUpdate("new/weights", 5, keeps_requests=True))
        await is_running(engine, server)


@pytest.mark.parametrize("kind", ["llamacpp", "generic"])
async def test_a_server_that_cannot_load_says_what_to_do_instead(kind: str) -> None:
    engine: Engine = LlamaCppEngine(name="x", url="http://127.0.0.1:1")
    if kind == "generic":
        engine = OpenAIEngine(name="x", url="http://127.0.0.1:1", dialect="generic")
    with pytest.raises(EngineRejected, match="set_policy_version"):
        await engine.update_parameters(ParameterUpdate("new", 1))


# -- instances --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sglang", "vllm"])
async def test_a_restart_is_seen(kind: str) -> None:
    async with on(kind) as (engine, server):
        first = (await engine.probe()).instance
        assert first == "1000.5"
        assert (await engine.probe()).instance == first
        server.started_at = 2000.5
        assert (await engine.probe()).instance == "2000.5"
        server.path_faults = {"/metrics": "503"}
        with pytest.raises(EngineUnavailable, match="when it was started"):
            await engine.probe()
        server.path_faults, server.started_at = {}, ""
        with pytest.raises(EngineUnavailable, match="when it was started"):
            await engine.probe()


@pytest.mark.parametrize("kind", ["sglang", "vllm"])
async def test_a_server_without_metrics_cannot_tell_and_is_not_asked_again(kind: str) -> None:
    async with on(kind) as (engine, server):
        server.started_at = None
        for _ in range(3):
            assert (await engine.probe()).instance is None
        assert server.asked.count("/metrics") == 1


async def test_a_restart_of_a_llama_cpp_server_is_seen(tmp_path: Path, models: Path) -> None:
    server, seen = embedded(tmp_path, models / "a.gguf"), []
    async with running_engine(server):
        for _ in range(2):
            assert server.url is not None
            engine = LlamaCppEngine(name="x", url=server.url)
            first = (await engine.probe()).instance
            assert first == (await engine.probe()).instance
            assert first is not None
            assert first.startswith(str(models / "a.gguf"))
            seen.append(first)
            await engine.aclose()
            await killed_and_back(server)
    assert seen[0] != seen[1]


# -- the embedded engine ----------------------------------------------------------------------------------------------


def embedded(tmp_path: Path, model: Path) -> EmbeddedEngine:
    return EmbeddedEngine(name="own", workdir=tmp_path, model=model, slots=2, threads=1)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``a.gguf`` and ``b.gguf``, which answer differently."""
    folder = tmp_path_factory.mktemp("models")
    write_tiny_model(folder / "a.gguf", seed=1)
    write_tiny_model(folder / "b.gguf", seed=2)
    return folder


async def says(engine: Engine) -> list[int]:
    return (await ask(engine, request(PROMPT, n=24, temperature=0.0))).tokens


async def test_embedded_serves_the_new_file_and_says_so(tmp_path: Path, models: Path) -> None:
    engine = embedded(tmp_path, models / "a.gguf")
    async with running_engine(engine):
        before, info, pid = await says(engine), await engine.probe(), engine.pid
        assert info.policy_version is None
        await engine.update_parameters(ParameterUpdate(str(models / "b.gguf"), 3))
        assert engine.pid != pid
        assert not Path(f"/proc/{pid}").exists(), "the old child is ended and collected"
        after = await engine.probe()
        assert (after.policy_version, after.instance != info.instance) == (3, True)
        assert await says(engine) != before
        await engine.update_parameters(ParameterUpdate(str(models / "a.gguf"), 4))
        assert await says(engine) == before


@pytest.mark.parametrize("broken", [b"this is no model", None])
async def test_embedded_goes_on_with_the_old_file_if_the_new_one_cannot_be_loaded(
    tmp_path: Path, models: Path, broken: bytes | None
) -> None:
    if broken is not None:
        (tmp_path / "broken.gguf").write_bytes(broken)
    engine = embedded(tmp_path, models / "a.gguf")
    async with running_engine(engine):
        before, pid = await says(engine), engine.pid
        with pytest.raises(EngineRejected, match=r"did not start on .*broken\.gguf"):
            await engine.update_parameters(ParameterUpdate(str(tmp_path / "broken.gguf"), 3))
        assert engine.pid == pid
        assert await says(engine) == before
        assert (await engine.probe()).policy_version is None


async def test_embedded_holds_what_it_serves_already_and_loads_what_was_replaced_by_renaming(
    tmp_path: Path, models: Path
) -> None:
    model = tmp_path / "current.gguf"
    model.write_bytes((models / "a.gguf").read_bytes())
    os.link(model, tmp_path / "link.gguf")
    engine = embedded(tmp_path, model)
    async with running_engine(engine):
        before, pid = await says(engine), engine.pid
        for version, same in enumerate((model, tmp_path / "link.gguf")):
            await engine.update_parameters(ParameterUpdate(str(same), version))
            assert (await engine.probe()).policy_version == version
        assert engine.pid == pid, "it serves these parameters already"
        os.utime(model, ns=(1, 1))  # as if it had been written to, which would have killed the server by now
        with pytest.raises(EngineRejected, match="another file"):
            await engine.update_parameters(ParameterUpdate(str(model), 1))
        (tmp_path / "new.gguf").write_bytes((models / "b.gguf").read_bytes())
        (tmp_path / "new.gguf").rename(model)
        await engine.update_parameters(ParameterUpdate(str(model), 2))
        assert await says(engine) != before
        assert (await engine.probe()).policy_version == 2


async def test_embedded_starts_again_on_the_newest_file_and_knows_its_version(tmp_path: Path, models: Path) -> None:
    model = tmp_path / "newest.gguf"
    model.write_bytes((models / "b.gguf").read_bytes())
    engine = embedded(tmp_path, models / "a.gguf")
    async with running_engine(engine):
        await engine.update_parameters(ParameterUpdate(str(model), 9))
        expected, info = await says(engine), await engine.probe()
        await killed_and_back(engine)
        assert await says(engine) == expected
        assert await engine.probe() == info, "the same parameters: nothing has changed"
        # what lies there after that is of no version that it knows
        (tmp_path / "other.gguf").write_bytes((models / "a.gguf").read_bytes())
        (tmp_path / "other.gguf").rename(model)
        await killed_and_back(engine)
        again = await engine.probe()
        assert again.policy_version is None
        assert again.instance != info.instance


async def killed_and_back(engine: EmbeddedEngine) -> None:
    pid = engine.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    with anyio.fail_after(DEADLINE_S):
        await until(lambda: engine.url is not None and engine.pid != pid)


async def test_embedded_can_be_updated_while_it_is_down(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.engines.embedded.engine.FIRST_RESTART_S", 0.02)
    engine = embedded(tmp_path, models / "a.gguf")
    async with running_engine(engine):
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGKILL)
        with anyio.fail_after(DEADLINE_S):
            await until(lambda: engine.url is None)
            await engine.update_parameters(ParameterUpdate(str(models / "b.gguf"), 2))
        pid = engine.pid
        assert (await engine.probe()).policy_version == 2
        await anyio.sleep(0.1)  # longer than the wait before a restart
        assert engine.pid == pid
        assert children() == {pid}, "not another one beside it"


async def test_embedded_does_not_keep_requests(tmp_path: Path, models: Path) -> None:
    engine = embedded(tmp_path, models / "a.gguf")
    with pytest.raises(EngineRejected, match="abort or finish"):
        await engine.update_parameters(ParameterUpdate(str(models / "b.gguf"), 1, keeps_requests=True))
    with pytest.raises(EngineUnavailable, match="is not running"):
        await engine.update_parameters(ParameterUpdate(str(models / "b.gguf"), 1))


async def test_an_embedded_update_that_is_cancelled_leaves_one_child(tmp_path: Path, models: Path) -> None:
    engine = embedded(tmp_path, models / "a.gguf")
    async with running_engine(engine):
        before, was_cut = await says(engine), 0
        for ms in (0, 2, 5, 20, 50, 100):
            with anyio.move_on_after(ms / 1000) as scope:
                await engine.update_parameters(ParameterUpdate(str(models / "b.gguf"), 1))
            was_cut += scope.cancelled_caught
            with anyio.fail_after(DEADLINE_S):
                await until(lambda: children() == {engine.pid})
            is_new = (await engine.probe()).policy_version == 1
            assert (await says(engine) == before) is not is_new
            if is_new:
                break
        assert was_cut > 0


def children() -> set[int]:
    """The processes of embedded servers; a test before may have left others, such as a browser that tests share."""
    found: set[int] = set()
    for task in Path(f"/proc/{os.getpid()}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread or a process that has just ended
            for child in map(int, (task / "children").read_text().split()):
                if SERVER.name.encode() in Path(f"/proc/{child}/cmdline").read_bytes():
                    found.add(child)
    return found


# -- the scripted engine ----------------------------------------------------------------------------------------------


async def test_a_scripted_engine_reports_what_it_was_given() -> None:
    engine = ScriptedEngine(name="s", time_scale=0, update_faults={2: "refuse", 3: "break", 4: "hang"})
    assert (await engine.probe()).policy_version is None
    await engine.update_parameters(ParameterUpdate("x", 1))
    failures: Sequence[tuple[int, type[EngineError]]] = ((2, EngineRejected), (3, EngineUnavailable))
    for version, kind in failures:
        with pytest.raises(kind):
            await engine.update_parameters(ParameterUpdate("x", version))
    with anyio.move_on_after(0.01):
        await engine.update_parameters(ParameterUpdate("x", 4))
    assert (await engine.probe()).policy_version == 1
    assert (await ask(engine, request(PROMPT, n=8))).tokens
    await engine.update_parameters(ParameterUpdate("x", 5))
    assert (await engine.probe()).policy_version == 5


async def test_a_scripted_engine_says_nothing_while_it_loads() -> None:
    engine, got, during = ScriptedEngine(name="s", time_scale=0, chunk=1, update_faults={4: "hang"}), Got(), []
    async with anyio.create_task_group() as tasks, anyio.create_task_group() as update:

        def sink(tokens: Sequence[int], logprobs: Sequence[float] | None, text: str) -> None:
            got.sink(tokens, logprobs, text)
            if len(got.tokens) == 4:
                update.start_soon(engine.update_parameters, ParameterUpdate("x", 4, keeps_requests=True))

        tasks.start_soon(engine.generate, request(PROMPT, n=50), sink)
        for _ in range(2):
            for _ in range(100):
                await anyio.lowlevel.checkpoint()
            during.append(len(got.tokens))
        update.cancel_scope.cancel()
    assert during[0] == during[1] < 10
    assert got.tokens == engine.expected_response(PROMPT, SamplingParams(max_new_tokens=50), 0)[0]


async def test_an_answer_that_never_comes_is_the_callers_to_give_up() -> None:
    async with sglang_on() as (engine, server):
        server.path_faults = {"/update_weights_from_disk": "silence"}
        with anyio.move_on_after(0.1) as scope:
            await engine.update_parameters(ParameterUpdate("x", 1))
        assert scope.cancelled_caught
        with pytest.raises(EngineStalled):
            await engine._http.ask_raw("/update_weights_from_disk", {}, deadline_s=0.05)


# -- a real server ----------------------------------------------------------------------------------------------------

VLLM_URL, VLLM_MODELS = (os.environ.get(f"ORCHESTRATOR_TEST_VLLM_{name}") for name in ("URL", "MODELS"))
"""See ``scripts/test-vllm``."""


@pytest.mark.skipif(not (VLLM_URL and VLLM_MODELS), reason="scripts/test-vllm runs it")
@pytest.mark.parametrize("keeps_requests", [False, True])
async def test_a_real_vllm_loads_other_parameters_and_goes_on(keeps_requests: bool) -> None:
    assert VLLM_URL is not None
    assert VLLM_MODELS is not None
    engine, got = OpenAIEngine(name="real", url=VLLM_URL), [Got() for _ in range(40)]

    async def one(i: int) -> None:
        got[i] = await ask(engine, request(PROMPT, n=400, seed=i))

    try:
        before, info = await says(engine), await engine.probe()
        async with anyio.create_task_group() as tasks:
            for i in range(len(got) if keeps_requests else 0):
                tasks.start_soon(one, i)
            await until(lambda: not keeps_requests or sum(bool(one.end) for one in got) > 2)
            await engine.update_parameters(ParameterUpdate(f"{VLLM_MODELS}/second", 2, keeps_requests))
            assert not keeps_requests or any(one.end is None for one in got)
        assert await says(engine) != before
        assert all(one.end is not None and one.end.reason == "stop" for one in got) or not keeps_requests
        assert (await engine.probe()).instance == info.instance is not None
        await engine.update_parameters(ParameterUpdate(f"{VLLM_MODELS}/first", 3))
        assert await says(engine) == before
    finally:
        await engine.aclose()
