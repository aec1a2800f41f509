"""A sample of ``scripts/bench --quick``, by its own program: shares and ratios within one run, with wide margins.

A bound lies at a third to a half of what the ratio was on a quiet machine: three busy programs beside it on two cores
took the ratios of the hand-out from 21, 120 and 19 to no less than 16, 110 and 18, and the plan's from 6 to 10 at most.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.bench.main import parse
from tests.bench.measure import Taken, family, interleave
from tests.bench.peers import ALL_PEERS, FOLDER, OPTIONAL, USUAL_PEERS, peers_python
from tests.bench.picture import draw, marks
from tests.bench.result import Figure, Options, Result, Unavailable
from tests.bench.through import PARTS, optional
from tests.support.paths import ROOT

DEADLINE_S = 170

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("bench")
    names = [argument for name in ("handout", "mixture", "waiting") for argument in ("--only", name)]
    output = ["--json", str(folder / "bench.json"), "--pictures", str(folder / "pictures")]
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.main", "--quick", "--sample", *names, "--peers", "orjson", *output],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        timeout=DEADLINE_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    whole = json.loads((folder / "bench.json").read_text())
    results = {result["name"]: result for result in whole["results"]}
    assert {path.stem for path in (folder / "pictures").iterdir()} == set(results) == {"handout", "mixture", "waiting"}
    for key in ("commit", "processor", "system", "packages", "load before"):
        assert whole["machine"][key]
    for result in results.values():
        assert f"== {result['name']}: {result['title']}" in done.stdout
        assert len({figure["size"] for figure in result["figures"]}) == 3
        assert result["growth"] in done.stdout
    return results


def value(result: dict[str, Any], what: str) -> float:
    [goal] = [goal for goal in result["goals"] if goal["what"] == what]
    return float(goal["value"])


def costs(result: dict[str, Any], contender: str) -> list[float]:
    """CPU time by size, from the smallest."""
    return [f["cpu_us"] for f in sorted(result["figures"], key=lambda f: f["size"]) if f["contender"] == contender]


def test_handing_out_costs_little_beside_a_bare_socket_and_much_less_than_json(measured: dict[str, Any]) -> None:
    result = measured["handout"]
    assert value(result, "long: of a bare socket's speed (CPU)") > 45
    assert value(result, "standard: of a bare socket's speed (CPU)") > 8
    assert value(result, "times as fast as JSON lists by orjson (CPU)") > 8
    small, _, large = costs(result, "orchestrator")
    assert large < 25 * small  # of 170 times as many bytes


def test_a_plan_costs_little_more_than_drawing_sources_at_random(measured: dict[str, Any]) -> None:
    result = measured["mixture"]
    assert value(result, "weights, counts and plan, of a plain script") < 15
    assert value(result, "a lambda, of Python's own") < 8
    few, _, many = costs(result, "planned")
    assert many < 16 * few * 2  # of 16 times as many sources: a square would be 256


def test_the_plan_keeps_the_trainer_busy_and_wastes_nothing(measured: dict[str, Any]) -> None:
    """In the engine's own time, which no machine's load changes: these are the goals themselves."""
    assert [goal["what"] for goal in measured["waiting"]["goals"] if goal["is_met"] is False] == []


def test_a_peer_that_is_not_known_is_refused_with_those_that_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--peers", "zmq,rabbit"])
    assert f"no peer rabbit; there are {', '.join(ALL_PEERS)}" in capsys.readouterr().err


def test_the_large_peers_are_installed_only_where_they_are_named(tmp_path: Path) -> None:
    assert not set(parse([]).peers.split(",")) & set(OPTIONAL)
    assert set(OPTIONAL) <= set(PARTS)
    before = set(FOLDER.parent.glob(f"{FOLDER.name}*"))
    assert peers_python(OPTIONAL) is None  # the usual environment holds nothing of theirs
    notes: list[str] = []
    with ExitStack() as stack:
        assert optional(Options(tmp_path, peers=USUAL_PEERS), stack, tmp_path, notes) == {}
    assert set(FOLDER.parent.glob(f"{FOLDER.name}*")) == before
    assert notes == []


@contextmanager
def running(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A run of the suite once the sender and the daemon of its first benchmark are there; ``folder`` is its TMPDIR."""
    run = subprocess.Popen(
        [sys.executable, "-m", "tests.bench.main", "--quick", "--sample", "--peers", "", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(folder)},
    )
    try:
        assert run.stdout is not None
        assert any(line.startswith("load before") for line in run.stdout)
        until(lambda: len(family(run.pid)) > 2 or run.poll() is not None)
        yield run
    finally:
        run.kill()
        run.communicate()


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def living(pids: set[int]) -> set[int]:
    return {pid for pid in pids if Path(f"/proc/{pid}").exists()}


def test_a_benchmark_whose_processes_are_killed_says_so_and_the_others_go_on(tmp_path: Path) -> None:
    with running(tmp_path, "--only", "handout", "--only", "mixture") as run:
        for pid in family(run.pid) - {run.pid}:
            os.kill(pid, signal.SIGKILL)
        told, _ = run.communicate(timeout=DEADLINE_S)
        assert run.returncode == 1
    handout, mixture = told.split("== mixture")
    assert "NOT MEASURED: " in handout
    assert "growth: " in mixture
    assert told.endswith("not measured, or not all of it: handout\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing_behind(number: signal.Signals, tmp_path: Path) -> None:
    folder = tmp_path / "tmp"
    folder.mkdir()
    with running(folder, "--only", "handout", "--only", "mixture", "--json", str(tmp_path / "json")) as run:
        started = family(run.pid) - {run.pid}
        run.send_signal(number)
        told, _ = run.communicate(timeout=DEADLINE_S)
        assert run.returncode == 1
    assert "NOT MEASURED: it was interrupted" in told
    assert told.endswith("not measured, or not all of it: handout, mixture\n")
    assert json.loads((tmp_path / "json").read_text())["results"][0]["missing"] == ["it was interrupted"]
    assert living(started) == set()
    assert list(folder.iterdir()) == []


def test_what_a_killed_program_leaves_behind_is_ended_too(tmp_path: Path) -> None:
    program = """if True:
        import os, subprocess
        from tests.bench.ending import adopt, end_descendants
        adopt()
        shell = subprocess.Popen(["sh", "-c", "sleep 600 & echo $!; wait"], stdout=subprocess.PIPE, text=True)
        left = int(shell.stdout.readline())
        shell.kill()
        shell.wait()
        print(end_descendants(), os.path.exists(f"/proc/{left}"))
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout == "1 False\n", done.stderr


def test_a_contender_that_is_gone_is_left_out_and_the_others_go_on() -> None:
    turns, lost = {"stays": 0, "goes": 0}, []

    def turn(name: str) -> Taken:
        turns[name] += 1
        if name == "goes" and turns[name] == 3:
            raise Unavailable("it was killed")
        return Taken(1.0, 1.0)

    contenders = {name: lambda name=name: turn(name) for name in turns}  # type: ignore[misc]
    found = interleave(contenders, 5, lose=lambda name, why: lost.append((name, str(why))))
    assert {name: len(taken) for name, taken in found.items()} == {"stays": 5}
    assert (turns, lost) == ({"stays": 6, "goes": 3}, [("goes", "it was killed")])
    turns["goes"] = 0
    with pytest.raises(Unavailable, match="it was killed"):
        interleave(contenders, 5)


@pytest.mark.parametrize(
    ("least", "greatest", "expected"),
    [
        (30, 700, [20, 50, 100, 200, 500, 1000]),
        (1.1e6, 1.8e6, [1e6, 2e6]),
        (5, 5, [5, 10]),
        (0.1, 0.3, [0.1, 0.2, 0.5]),
    ],
)
def test_a_picture_is_marked_from_below_the_least_to_above_the_greatest(
    least: float, greatest: float, expected: list[float]
) -> None:
    assert marks(least, greatest) == pytest.approx(expected)


def test_a_picture_is_drawn_where_nothing_waited(tmp_path: Path) -> None:
    figures = [Figure("plan", 8, 0.0, 10.0), Figure("plan", 16, 4.0, 10.0), Figure("other", 8, 90.0, 10.0)]
    picture = draw(Result("waiting", "Waits", "a step", "groups", figures=figures, is_of_waits=True), tmp_path)
    assert picture.stat().st_size > 10_000
