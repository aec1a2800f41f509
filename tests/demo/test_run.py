"""The parts of the demo that need no processes: its config, what it reads of a run, its picture and tables."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image, ImageChops
from rich.console import Console

from orchestrator.cli import main
from orchestrator.cli.exit_codes import USAGE
from orchestrator.config import load_config
from orchestrator.demo.display import comparison, live, summary
from orchestrator.demo.keeper import DemoFailed, Keeper
from orchestrator.demo.picture import Panel, PictureError, draw
from orchestrator.demo.progress import WINDOW, Curve, ProgressFile, Restart, Run, Step
from orchestrator.demo.run import Moment
from orchestrator.demo.setup import SCHEDULES, Places, Schedule, write_config


def step(number: int, *, easy: float = 0.5, hard: float | None = None, share: float = 0.0) -> Step:
    counts = {"easy": 12 - round(12 * share), "hard": round(12 * share)}
    rewards = {"easy": easy} if hard is None else {"easy": easy, "hard": hard}
    weights = {"easy": 1 - share, "hard": share}
    return Step(number, 1000.0 + number / 4, weights, counts, rewards, samples=96, continued=number % 2, gap=0.001)


def learning(seed: int = 0, steps: int = 200) -> Run:
    found = [
        step(n, easy=min(1.0, n / 80), hard=max(0.0, (n - 100) / 80) if n >= 100 else None, share=0.8 * (n >= 100))
        for n in range(steps)
    ]
    return Run("curriculum", seed, ("easy", "hard"), found, 50.0)


# -- the config --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_config_of_every_schedule_is_one_that_the_daemon_takes(
    tmp_path: Path, schedule: Schedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = Places(tmp_path / "run")
    write_config(places, schedule=schedule, seed=7, steps=33, http=None)
    config = load_config(places.config)
    assert (config.run.seed, config.rollout.num_rollout, config.source_names) == (7, 33, ("easy", "hard"))
    assert main(["check", str(places.config)]) == 0


# -- what was noted ----------------------------------------------------------------------------------------------------


def line(of: Step) -> str:
    return json.dumps({key: getattr(of, key) for key in Step.__slots__} | {"more": 1}) + "\n"


def test_steps_are_read_as_they_come_and_count_once(tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    file = ProgressFile(path)
    assert file.read() == []
    torn = line(step(2))
    path.write_text(line(step(0)) + line(step(1)) + torn[:20])
    assert file.read() == [step(0), step(1)]
    with path.open("a") as more:
        more.write(torn[20:] + line(step(1)) + line(step(3)))
    assert file.read() == [step(n) for n in range(4)]


def test_a_curve_is_smoothed_over_its_last_values() -> None:
    curve = Curve(tuple(range(50)), tuple([0.0] * 25 + [1.0] * 25))
    smooth = curve.smoothed().values
    assert smooth[24] == 0
    assert smooth[24 + WINDOW // 2] == pytest.approx(0.5)
    assert smooth[24 + WINDOW] == 1
    assert Curve((), ()).last is None


def test_what_a_run_comes_to() -> None:
    run = learning()
    assert run.groups_asked("hard") == pytest.approx(960)
    assert run.groups_received("hard") == 1000
    assert run.learned_at("easy") == pytest.approx(82, abs=3)
    assert run.learned_at("hard") == pytest.approx(182, abs=3)
    assert learning(steps=50).learned_at("hard") is None


# -- what is shown -----------------------------------------------------------------------------------------------------


def shown(renderable: object, width: int = 100) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115 - ends with the test
    console.print(renderable)
    console.file.close()
    return console.export_text()


def test_the_display_says_where_a_run_stands() -> None:
    status = {
        "sources": {name: {"groups": {"buffered": 5, "in_flight": 7}} for name in ("easy", "hard")},
        "engines": [{"name": "embedded-0", "state": "down"}],
    }
    run = replace(learning(steps=120), restarts=(Restart(30, "trainer"), Restart(60, "trainer")))
    text = shown(live(Moment(run, 400, status, {}, "127.0.0.1:8642")))
    for said in (
        "step 120 of 400",
        "1:10 left",
        "80%",
        "trainer restarts: 2",
        "embedded-0: down",
        "60 of 11520",
        "http://127.0.0.1:8642/",
    ):
        assert said in text
    nothing_yet = shown(live(Moment(learning(steps=0), 400, None, {})))
    assert "is not answering" in nothing_yet
    assert "live page" not in nothing_yet


@pytest.mark.parametrize(("width", "height"), [(80, 24), (120, 40)])
def test_the_display_fits_on_a_terminal(width: int, height: int) -> None:
    moment = Moment(learning(steps=200), 200, None, {}, "127.0.0.1:8642")
    lines = shown(live(moment, width), width).splitlines()
    assert len(lines) < height
    assert max(map(len, lines)) <= width
    curves = [line for line in lines if line.startswith(("  easy", "  hard"))]
    assert all("…" not in line and line.rstrip().endswith("█") for line in curves), curves


def test_the_tables_say_what_was_asked_and_what_came() -> None:
    text = shown(summary(learning()))
    assert "960.00" in text
    assert "1000" in text
    assert "+40.00" in text
    never = Run("hard-only", 1, ("easy", "hard"), [step(0)], 1.0)
    assert "hard-only" in shown(comparison([learning(), never]))
    assert "never seen" in shown(summary(never))


def test_the_picture_is_a_small_png(tmp_path: Path) -> None:
    one = Panel("curriculum, seed 0", [learning()], 200)
    draw([one], tmp_path / "one.png", title="one")
    draw([Panel("all", [learning(seed) for seed in range(3)], 200)] * 3, tmp_path / "three.png", title="three")
    for name, width in (("one", 900), ("three", 1440)):
        assert (tmp_path / f"{name}.png").stat().st_size < 200_000
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert picture.size == (width, 560)
            assert len(picture.convert("RGB").getcolors(1 << 20)) > 20, "something is on it"
    with pytest.raises(PictureError, match="cannot write"):
        draw([one], tmp_path / "missing" / "one.png", title="one")


def test_a_run_without_steps_can_be_drawn(tmp_path: Path) -> None:
    draw([Panel("nothing", [Run("mix", 0, ("easy", "hard"), [])], 10)], tmp_path / "empty.png", title="empty")


def test_what_was_started_again_is_marked(tmp_path: Path) -> None:
    plain, marked = tmp_path / "plain.png", tmp_path / "marked.png"
    for path, restarts in ((plain, ()), (marked, (Restart(50, "daemon"), Restart(150, "engine")))):
        draw([Panel("one", [replace(learning(), restarts=restarts)], 200)], path, title="one")
    with Image.open(plain) as one, Image.open(marked) as other:
        changed = ImageChops.difference(one.convert("RGB"), other.convert("RGB")).point(lambda v: 255 * (v > 60))
        columns = {x for x in range(900) if changed.crop((x, 80, x + 1, 320)).getbbox() is not None}
    assert {min((250, 642), key=lambda at: abs(x - at)) for x in columns} == {250, 642}
    assert max(min(abs(x - 250), abs(x - 642)) for x in columns) <= 2


def test_a_picture_that_cannot_be_written_is_named_before_the_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--picture", "it.svg"]) == USAGE
    assert "use --picture it.png" in capsys.readouterr().err
    assert main(["demo", "--picture", str(tmp_path / "missing" / "it.png")]) == USAGE
    assert "this folder is not writable" in capsys.readouterr().err
    assert main(["demo", "--schedule", "easy-only"]) == USAGE


# -- processes ---------------------------------------------------------------------------------------------------------


def keeper(tmp_path: Path, program: str) -> Keeper:
    return Keeper(
        "thing", [sys.executable, "-c", program], tmp_path / "out", environment={"WORD": "hello"}, directory=tmp_path
    )


def test_a_process_that_is_killed_is_started_again(tmp_path: Path) -> None:
    once = "import os, pathlib\np = pathlib.Path('seen')\nif not p.exists():\n p.touch()\n os.kill(os.getpid(), 9)"
    with keeper(tmp_path, once) as process:
        first = process.pid
        while not process.has_finished(30):
            pass
        assert (process.restarts, process.pid == first) == (1, False)


def test_a_process_that_fails_is_not(tmp_path: Path) -> None:
    program = "import os; raise SystemExit(os.environ['WORD'])"
    with keeper(tmp_path, program) as process, pytest.raises(DemoFailed, match=r"thing exited with code 1:\nhello"):
        process.has_finished(30)
    assert process.restarts == 0
