"""The demo's run in short: real daemon, real llama.cpp, real trainer; it learns, and a SIGKILL of each changes nothing.

Chance finds a number of one or two digits, among 16 tokens, in 3 of 100 answers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from examples.curriculum_learning.tiny_llama import write_gguf
from examples.curriculum_learning.trainer import State, train, update
from orchestrator.client import RolloutClient
from orchestrator.demo.keeper import Keeper
from orchestrator.demo.progress import ProgressFile, Run, Step
from orchestrator.demo.run import Moment, run
from orchestrator.demo.setup import Places, working_directory, write_config
from tests.campaigns.checks import until
from tests.campaigns.first_run_kills import breaks, daemon, engine, killing, trainer

STEPS = 40
CHANCE = 0.5 / 16 + 0.5 / 16**2
KILLS = {"daemon": 1, "trainer": 2}

pytestmark = pytest.mark.timeout(150)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def moments() -> list[Moment]:
    return []


@pytest.fixture(scope="module")
def finished(folder: Path, moments: list[Moment]) -> Run:
    return run(
        folder,
        schedule="curriculum",
        seed=0,
        steps=STEPS,
        http=None,
        show=killing({8: trainer, 16: daemon, 24: engine, 28: trainer}, moments.append),
    )


def test_it_learns_what_chance_does_not_give(finished: Run) -> None:
    rewards = finished.rewards("easy").values
    assert np.mean(rewards[:5]) < 3 * CHANCE
    assert np.mean(rewards[-8:]) > 4 * CHANCE  # of 768 answers: 15 standard deviations; 0.28 and more came


def test_a_break_in_the_curve_would_be_found() -> None:
    """The comparison of ``scripts/demo-kills``, on curves that are known."""
    draw = np.random.default_rng(0)

    def of(rewards: Any) -> Run:
        noisy = np.clip(rewards + draw.normal(0, 0.05, len(rewards)), 0, 1)
        steps = [Step(n, n, {"easy": 1.0}, {"easy": 12}, {"easy": float(r)}, 96, 0, 0.0) for n, r in enumerate(noisy)]
        return Run("curriculum", 0, ("easy",), steps)

    whole = np.minimum(0.95, np.arange(300) / 150)
    forgotten = whole.copy()
    forgotten[100:] = whole[90:290] * 0.7
    assert [is_break for _, is_break in breaks(of(whole), {100: "daemon"})] == [False]
    assert [is_break for _, is_break in breaks(of(forgotten), {100: "daemon"})] == [True]


def test_every_step_was_trained_on_once(finished: Run, folder: Path, moments: list[Moment]) -> None:
    assert Counter(restart.name for restart in finished.restarts) == KILLS
    assert [step.step for step in finished.steps] == list(range(STEPS))
    assert State.load(folder / "trainer" / "trainer.npz").step == STEPS
    noted: dict[int, dict[str, Any]] = {}
    for line in (folder / "trainer" / "progress.jsonl").read_text().splitlines():
        values = json.loads(line)
        again = noted.setdefault(values["step"], values)
        same = ("weights", "counts", "rewards", "samples", "versions")  # a batch that came again was the same batch
        assert [values[key] for key in same] == [again[key] for key in same]


def test_a_batch_that_was_saved_and_not_acknowledged_is_passed_over(tmp_path: Path) -> None:
    """What a kill between saving and acknowledging leaves: the batch comes again, and is not trained on again."""
    places = Places(tmp_path)
    write_config(places, schedule="curriculum", seed=1, steps=3, http=None)
    places.trainer.mkdir()
    state = State.initial(1)
    write_gguf(state.parameters, places.model)
    command = [sys.executable, "-m", "orchestrator", "run", str(places.config)]
    with Keeper("daemon", command, tmp_path / "out", environment={}, directory=working_directory()):
        with RolloutClient(places.socket, connect_timeout_s=30) as client:
            batch = client.get_batch(timeout_s=30)
            update(state, batch)
            state.save(places.trainer / "trainer.npz")
        with RolloutClient(places.socket, connect_timeout_s=30) as client:
            train(client, places.trainer, State.load(places.trainer / "trainer.npz"))
            assert client.status()["policy_version"] == 3
    assert [step.step for step in ProgressFile(places.progress).read()] == [1, 2]
    last = State.load(places.trainer / "trainer.npz")
    assert last.step == 3
    assert last.parameters.keys() == last.mean.keys() == last.square.keys() == state.parameters.keys()


def test_what_is_saved_is_everything(tmp_path: Path) -> None:
    state = State.initial(4)
    state.mean["output.weight"] += 1
    state.square["output.weight"] += 2
    state.step = 7
    state.save(tmp_path / "trainer.npz")
    loaded = State.load(tmp_path / "trainer.npz")
    assert loaded.step == 7
    for name, array in state.parameters.items():
        assert np.array_equal(loaded.parameters[name], array)
        assert np.array_equal(loaded.mean[name], state.mean[name])
        assert np.array_equal(loaded.square[name], state.square[name])
        assert loaded.parameters[name].dtype == np.float32


def test_tokens_bear_the_version_of_the_parameters_that_drew_them(finished: Run) -> None:
    """Between two versions log-probabilities differ by some 0.05; the engine's rounding is far below that."""
    assert max(step.gap for step in finished.steps) < 0.003


def test_it_goes_on_in_a_folder_that_was_kept(finished: Run, folder: Path) -> None:
    more = run(folder, schedule="curriculum", seed=0, steps=STEPS + 3, http=None, show=lambda _: None)
    assert [step.step for step in more.steps] == list(range(STEPS + 3))
    assert more.steps[:STEPS] == finished.steps


def processes_of(folder: Path) -> list[int]:
    """Those whose command line names something in the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended since
            if os.fsencode(folder) in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def test_a_demo_that_is_told_to_end_leaves_nothing_running(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "orchestrator", "demo", "--steps", "100000", "--keep", str(tmp_path / "kept")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=working_directory(), text=True) as process:
        try:
            until(lambda: len(processes_of(tmp_path)) == 4, "demo, daemon, engine and trainer")
            process.terminate()
            said, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 1
    assert "To continue, run it again with --keep" in " ".join(said.split())
    assert processes_of(tmp_path) == []
