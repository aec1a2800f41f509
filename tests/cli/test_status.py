"""`orchestrator status`, `engines`, `check`: what a terminal of 80 columns shows of large figures and long words."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from orchestrator.cli import main
from orchestrator.cli.exit_codes import OK
from orchestrator.cli.status import engine_table
from tests.cli.test_check import ROOT

ENGINE: dict[str, Any] = {
    "name": "127.0.0.1:30000",
    "state": "outdated",
    "in_flight": 256,
    "max_in_flight": 256,
    "completed": 123_456,
    "failed": 3,
    "late": 12,
    "tokens": 381_912_345,
    "policy_version": 1234,
    "last_error": "engine 127.0.0.1:30000: /v1: it said\n[/INST] \x1b[2J and no more",
}


def shown(*engines: dict[str, Any]) -> str:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(engine_table(engines))
    return capture.get()


def test_large_figures_are_whole_at_80_columns_and_the_last_error_stands_beneath() -> None:
    text = shown(ENGINE, {**ENGINE, "name": "second", "last_error": None})
    assert "…" not in text
    assert "127.0.0.1:30000 outdated 256 / 256 123456 3 12 382 M 1234" in " ".join(text.split())
    assert text.count("last error") == 1


def test_words_of_a_server_are_no_markup_and_steer_no_terminal() -> None:
    text = shown(ENGINE)
    assert "127.0.0.1:30000: last error: /v1: it said [/INST]  [2J and no more" in text
    assert "\x1b[2J" not in text


@pytest.mark.parametrize("command", [["check"], ["weights", "--steps", "3"]])
def test_that_adaptive_weights_cannot_be_foretold_is_said(
    command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    said = "adaptive weights are shown at their starting values"
    assert main([*command, "config/demo.yaml"]) == OK
    assert said in capsys.readouterr().out
    assert main([*command, "config/minimal.yaml"]) == OK
    assert said not in capsys.readouterr().out
