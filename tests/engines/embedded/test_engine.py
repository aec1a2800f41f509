"""The embedded engine's child process: it starts, dies and ends as it should."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import anyio
import pytest

from orchestrator.engines import SamplingParams
from orchestrator.engines.embedded.engine import EmbeddedEngine
from orchestrator.engines.embedded.tiny_model import write_tiny_model
from orchestrator.errors import EngineError, EngineUnavailable
from orchestrator.records import Sample
from tests.support.engine_pools import DEADLINE_S, Got, ask, request, running_engine, running_pool
from tests.support.paths import ROOT

PROMPT = list(b"a prompt")


def embedded(tmp_path: Path, **options: object) -> EmbeddedEngine:
    return EmbeddedEngine(name="own", workdir=tmp_path, slots=2, threads=1, **options)  # type: ignore[arg-type]


async def gone(pid: int) -> None:
    """Wait until there is no such process."""
    with anyio.fail_after(DEADLINE_S):
        while Path(f"/proc/{pid}").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text():  # noqa: ASYNC110
            await anyio.sleep(0.01)


async def test_it_ends_with_its_task(tmp_path: Path) -> None:
    engine = embedded(tmp_path)
    async with running_engine(engine):
        pid = engine.pid
        assert pid is not None
        assert (await engine.probe()).context_tokens == 2048
    await gone(pid)
    assert engine.pid is None
    with pytest.raises(EngineUnavailable, match="not running"):
        await engine.probe()


async def test_it_starts_again_after_it_was_killed_and_samples_go_on(tmp_path: Path) -> None:
    engine = embedded(tmp_path)
    async with running_pool(engine, chunk_tokens=8) as pool:
        first = engine.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        sample = Sample(index=0)
        with anyio.fail_after(DEADLINE_S):
            await pool.generate(sample, PROMPT, SamplingParams(max_new_tokens=16))
        assert sample.tokens
        assert sample.is_finished
        assert engine.pid not in (None, first)


async def test_a_request_under_way_when_it_dies_fails_and_keeps_its_tokens(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "endless.gguf", mean_tokens=1e12)
    engine, got = embedded(tmp_path, model=tmp_path / "endless.gguf"), Got()
    async with running_engine(engine):
        os_pid = engine.pid
        assert os_pid is not None

        def sink(*given: object) -> None:
            if not got.tokens:
                os.kill(os_pid, signal.SIGKILL)
            got.sink(*given)  # type: ignore[arg-type]

        with anyio.fail_after(DEADLINE_S), pytest.raises(EngineUnavailable):
            await engine.generate(request(PROMPT, n=1500, seed=1), sink)
    assert got.tokens


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"this is no model", "this is not a GGUF file"),
        (b"", "this is not a GGUF file"),
        (b"GGUF" + bytes(64), "(2 slots of 2048 tokens)"),
    ],
)
async def test_a_model_that_cannot_be_loaded_stops_it_with_the_reason(
    tmp_path: Path, content: bytes, says: str
) -> None:
    model = tmp_path / "broken.gguf"
    model.write_bytes(content)
    with pytest.raises(ExceptionGroup) as caught, anyio.fail_after(DEADLINE_S):
        async with anyio.create_task_group() as tasks:
            await tasks.start(embedded(tmp_path, model=model).run)
    (error,) = caught.value.exceptions
    assert isinstance(error, EngineError)
    assert "broken.gguf" in str(error)
    assert says in str(error)
    assert "Traceback" not in str(error)


async def test_without_xllamacpp_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EngineError, match=r"rollout-orchestrator\[demo\]"):
        await embedded(tmp_path).run(task_status=anyio.TASK_STATUS_IGNORED)


PARENT = """
import sys, anyio
from pathlib import Path
from orchestrator.engines.embedded import EmbeddedEngine

async def main():
    engine = EmbeddedEngine(name="own", workdir=Path(sys.argv[1]), slots=1, threads=1)
    async with anyio.create_task_group() as tasks:
        await tasks.start(engine.run)
        print(engine.pid, flush=True)
        await anyio.sleep_forever()

anyio.run(main)
"""


async def test_it_does_not_outlive_a_parent_that_was_killed(tmp_path: Path) -> None:
    root = ROOT
    command = [sys.executable, "-c", PARENT, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root) as parent:  # noqa: ASYNC220
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
    await gone(pid)


async def test_more_requests_than_slots_all_end(tmp_path: Path) -> None:
    engine = embedded(tmp_path, max_in_flight=16)
    got: list[Got] = []

    async def one(seed: int) -> None:
        got.append(await ask(engine, request(PROMPT, n=8, seed=seed)))

    async with running_engine(engine), anyio.create_task_group() as tasks:
        for seed in range(16):
            tasks.start_soon(one, seed)
    assert len(got) == 16
    assert all(one.tokens for one in got)
