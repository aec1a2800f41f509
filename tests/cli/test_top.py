"""``orchestrator top``: what matters fits on 80 x 24, on a real terminal, whatever a status has."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from fcntl import ioctl
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli.screen import FIELDS, render_screen, sparkline
from orchestrator.status.history import FIELDS as POINT_FIELDS
from tests.support.daemon_process import daemon, write_config

pytestmark = pytest.mark.timeout(60)

DEADLINE_S = 30.0


class Terminal:
    """A program at a pseudo-terminal of 80 x 24; what it wrote since it was last looked at."""

    def __init__(self, *command: str) -> None:
        self._controller, follower = pty.openpty()
        ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "", "LINES": ""}
        environment = {key: value for key, value in environment.items() if value}
        self.process = subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower, env=environment)
        os.close(follower)

    def shows(self, *words: str) -> str:
        """What is written, without its colours, once all of these have come."""
        seen, deadline = "", time.monotonic() + DEADLINE_S
        while not all(re.search(word, seen) for word in words):
            assert time.monotonic() < deadline, seen[-4000:]
            if select.select([self._controller], [], [], 0.2)[0]:
                seen += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", os.read(self._controller, 65536).decode(errors="replace"))
        return seen

    def press(self, key: str) -> None:
        os.write(self._controller, key.encode())

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._controller)


def test_it_follows_a_run_through_a_restart_and_ends_with_a_key(tmp_path: Path) -> None:
    with daemon(write_config(tmp_path)) as process, process.connect() as trainer:
        trainer.get_batch(timeout_s=30)
        command = (sys.executable, "-m", "orchestrator", "top", "--socket", str(process.socket), "--interval", "0.2")
        terminal = Terminal(*command)
        try:
            terminal.shows(
                "test  step 1 ", "q: quit", r"The trainer has been working on step 0", "easy +7", "scripted-0 +up"
            )
            trainer.pause("hard")
            terminal.shows("hard .*paused", "hard is paused from step 1 on")
            process.signal(signal.SIGKILL)
            process.wait()
            terminal.shows("no daemon, retrying")
            process.start()
            terminal.shows("resuming at step 1")
            terminal.press("q")
            assert terminal.process.wait(DEADLINE_S) == 0
        finally:
            terminal.close()


def many(count: int, status: dict[str, Any]) -> dict[str, Any]:
    """The same with that many sources and engines, of long names, and a long cause."""
    source, engine = status["sources"]["easy"], status["engines"][0]
    names = [f"source-with-a-name-of-some-length-{i}" for i in range(count)]
    plan = [{"step": 1, "weights": dict.fromkeys(names, 1 / count), "counts": dict.fromkeys(names, 1)}]
    numbers = status["history"][-1]["sources"]["easy"]
    return status | {
        "sources": dict.fromkeys(names, source),
        "plan": plan,
        "history": [{**status["history"][-1], "sources": dict.fromkeys(names, numbers)}],
        "engines": [{**engine, "name": f"engine-{i}", "last_error": "it broke " * 30} for i in range(count)],
        "headline": {
            "level": "late",
            "text": "The trainer has been waiting for 75 s. " + "A source lacks groups, " * 40,
        },
        "events": [{**status["events"][0], "message": "\x1b[2J something happened " * 9, "source": "easy"}] * 20,
    }


@pytest.fixture(scope="module")
def status(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of a run that has handed two batches out."""
    with daemon(write_config(tmp_path_factory.mktemp("top"))) as process, process.connect() as trainer:
        trainer.ack(trainer.get_batch(timeout_s=30).lease)
        trainer.get_batch(timeout_s=30)
        return trainer.status(history=5)


def test_nothing_sticks_out_and_what_is_left_out_is_counted(status: dict[str, Any]) -> None:
    for count in (1, 2, 30):
        for width, height in ((40, 8), (80, 24), (120, 40), (300, 100)):
            lines = render_screen(many(count, status), width, height, tokens_per_s=1e6)
            assert len(lines) <= height
            assert max(line.cell_len for line in lines) <= width
            assert not [line.plain for line in lines if "\x1b" in line.plain]
    text = "\n".join(line.plain for line in render_screen(many(30, status), 80, 24))
    for word in (
        "The trainer has been waiting",
        " more",
        "engine-0",
        "staleness 0.0 (max 0)",
        "reward tokens",
        "q: quit",
    ):
        assert word in text
    assert re.search(r"… and \d+ more", text)


def test_the_lines_hold_every_figure_of_a_small_run(status: dict[str, Any]) -> None:
    lines = [line.plain for line in render_screen(status, 80, 24)]
    head = next(line for line in lines if line.startswith("source"))
    row = next(line for line in lines if line.startswith("easy"))
    source, plan = status["sources"]["easy"], status["plan"][0]
    figures = row.split()[1:10]
    assert head.split()[1:10] == ["share", "next", "ready", "flight", "plan", "bound", "handed", "drop", "reward"]
    assert figures == [
        f"{100 * plan['weights']['easy']:.1f}%",
        *map(
            str, (plan["counts"]["easy"], source["groups"]["buffered"], source["groups"]["in_flight"], source["wanted"])
        ),
        *map(str, (source["bound"], source["handed_out"], source["groups"]["dropped"])),
        "0.000",
    ]
    assert row.split()[10] == "8", "tokens of a response"


def test_what_fails_beside_the_batches_is_said(status: dict[str, Any]) -> None:
    sinks = [
        {"name": name, "fault": fault} for name, fault in [("a", None), *((f"s{i}", "it is full") for i in range(4))]
    ]
    failing = {**status, "archive": {"fault": "no room for step 7"}, "sinks": sinks}
    lines = [line.plain.rstrip() for line in render_screen(failing, 80, 24)]
    assert "Archive: no room for step 7" in lines
    assert "Metrics to s0: it is full" in lines
    assert "… and 3 more" in lines
    assert len(lines) <= 24
    sound = [line.plain for line in render_screen({**status, "archive": {"fault": None}, "sinks": sinks[:1]}, 80, 24)]
    assert sound == [line.plain for line in render_screen({**status, "archive": None, "sinks": []}, 80, 24)]


def test_fields_are_where_the_history_has_them() -> None:
    assert {name: POINT_FIELDS.index(name) for name in FIELDS} == FIELDS
    assert sparkline([0.0, None, 1.0, 0.5], 6) == "  ▁ █▅"
    assert sparkline([2.0, 2.0], 1) == "▁"
