"""`orchestrator weights`: table, JSON lines and picture of a curriculum."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.cli import main
from orchestrator.cli.exit_codes import BAD_CONFIG, FAILED, OK, USAGE
from tests.support.daemon_process import daemon, write_config
from tests.support.paths import ROOT

CURRICULUM = str(ROOT / "config/curriculum.yaml")
BATCH = 16


def json_lines(text: str) -> list[dict[str, dict[str, float]]]:
    return [json.loads(line) for line in text.splitlines()]


def test_json_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["weights", CURRICULUM, "--steps", "240", "--json"]) == OK
    lines = json_lines(capsys.readouterr().out)
    assert [line["step"] for line in lines] == list(range(240))
    handed_out = share = 0.0
    for line in lines:
        assert set(line) == {"step", "weights", "counts"}
        assert sum(line["weights"].values()) == pytest.approx(1)
        assert sum(line["counts"].values()) == BATCH
        handed_out += line["counts"]["easy"]
        share += BATCH * line["weights"]["easy"]
        assert abs(handed_out - share) < 1
    assert lines[0]["weights"] == pytest.approx({"easy": 0.9, "hard": 0.1})
    assert lines[200]["weights"] == pytest.approx({"easy": 0.1, "hard": 0.9})


def test_start_leaves_out_and_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    main(["weights", CURRICULUM, "--steps", "50", "--json"])
    whole = capsys.readouterr().out.splitlines()
    main(["weights", CURRICULUM, "--start", "37", "--steps", "13", "--json"])
    assert capsys.readouterr().out.splitlines() == whole[37:]


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["weights", CURRICULUM, "--steps", "3"]) == OK
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert ["0", "0.900", "14", "0.100", "2"] in rows


def test_a_broken_weight_is_a_bad_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "config/minimal.yaml").read_text().replace("weights: [1]", 'weights: ["lambda step: 5 - step"]')
    (tmp_path / "run.yaml").write_text(text)
    assert main(["weights", str(tmp_path / "run.yaml"), "--steps", "5"]) == OK
    assert main(["weights", str(tmp_path / "run.yaml"), "--steps", "6"]) == BAD_CONFIG
    assert "data_source_weights: all weights are 0 at step 5" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--steps", "0"], ["--steps", "x"], ["--steps", "1", "--start", "-1"]])
def test_usage(arguments: list[str]) -> None:
    assert main(["weights", CURRICULUM, *arguments]) == USAGE


def test_what_is_in_force_in_a_daemon_and_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, data_source_weights=["orchestrator.adaptive_weights.learnability", 0.4])
    with daemon(config) as process:
        with process.connect(client="an operator") as client:
            client.ack(client.get_batch(timeout_s=30).lease)
            client.set_weight("hard", "lambda step: 2")
            client.pause("easy")
        assert main(["weights", "--socket", str(process.socket), "--json"]) == OK
        easy, hard = map(json.loads, capsys.readouterr().out.splitlines())
        assert (easy["kind"], easy["share"]) == ("adaptive", 0.0)
        assert "pass rate" in easy["why"]
        assert easy["why"].endswith("; paused")
        assert (hard["text"], hard["value"], hard["share"]) == ("lambda step: 2", 2.0, 1.0)
        assert hard["why"] == "set at run time; the config file says 0.4"
        assert main(["weights", "--socket", str(process.socket)]) == OK
        assert "weights from step 1 on" in capsys.readouterr().out
        process.wait_for_line("easy is paused from step 1 on, by an operator")
        audit = [line["message"] for line in process.log if "an operator" in line["message"]]
        assert [text.partition(" (pid ")[0] for text in audit] == [
            "the weight of hard is lambda step: 2, was 0.4 from step 1 on, by an operator",
            "easy is paused from step 1 on, by an operator",
        ]


# -- pictures ---------------------------------------------------------------------------------------------------------


def png_size(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    return int.from_bytes(content[16:20]), int.from_bytes(content[20:24])


@pytest.mark.parametrize("steps", ["1", "2", "9", "240"])
def test_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str], steps: str) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "weights.png"
    assert main(["weights", CURRICULUM, "--steps", steps, "--plot", str(file)]) == OK
    assert png_size(file) == (1280, 832)
    assert capsys.readouterr().out == f"wrote {file}\n"


def test_a_picture_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert main(["weights", CURRICULUM, "--steps", "2", "--plot", str(tmp_path / "away" / "w.png")]) == FAILED
    assert "w.png: No such file or directory" in capsys.readouterr().err
    assert main(["weights", CURRICULUM, "--steps", "2", "--plot", str(tmp_path / "w.gif")]) == FAILED
    assert "the plot is a PNG file; use --plot w.png" in capsys.readouterr().err


# -- in a process of its own ------------------------------------------------------------------------------------------

# Buffered, as in a user's shell: unbuffered, a closed pipe shows at the write and never at exit.
BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
ORCHESTRATOR = [sys.executable, "-c", "import sys; from orchestrator.cli import main; sys.exit(main())"]


def test_without_matplotlib_the_extra_is_named(tmp_path: Path) -> None:
    absent = "import sys; sys.modules['matplotlib'] = None; from orchestrator.cli import main; sys.exit(main())"
    ended = subprocess.run(
        [sys.executable, "-c", absent, "weights", CURRICULUM, "--steps", "2", "--plot", str(tmp_path / "w.png")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (FAILED, "")
    assert "pip install 'rollout-orchestrator[plot]'" in ended.stderr


def test_a_reader_that_is_gone_before_anything_is_written() -> None:
    """As `| true` does; also of `check`, whose report is one small write."""
    for command in (["check", CURRICULUM], ["weights", CURRICULUM, "--steps", "1"]):
        read, write = os.pipe()
        os.close(read)
        ended = subprocess.run(
            [*ORCHESTRATOR, *command],
            cwd=ROOT,
            env=BUFFERED,
            stdout=write,
            stderr=subprocess.PIPE,
            timeout=30,
            check=False,
        )
        os.close(write)
        assert (ended.returncode, ended.stderr) == (OK, b"")


@pytest.mark.parametrize("arguments", [["--json"], []])
def test_a_reader_that_leaves_early_causes_no_traceback(arguments: list[str]) -> None:
    """As `| head -1` does; the output is larger than the pipe holds."""
    read, write = os.pipe()
    with subprocess.Popen(
        [*ORCHESTRATOR, "weights", CURRICULUM, "--steps", "3000", *arguments],
        cwd=ROOT,
        env=BUFFERED,
        stdout=write,
        stderr=subprocess.PIPE,
    ) as process:
        os.close(write)
        assert os.read(read, 10)
        os.close(read)
        _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (OK, b"")
