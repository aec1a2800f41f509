"""Samples of the long scripts under ``scripts/torture``, by the scripts' own programs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

pytestmark = pytest.mark.timeout(180)


def can_trace() -> bool:
    """Whether this machine has strace and lets it attach to a process."""
    if shutil.which("strace") is None:
        return False
    traced = subprocess.run(["strace", "-o", os.devnull, "true"], capture_output=True, check=False)
    return traced.returncode == 0


needs_strace = pytest.mark.skipif(not can_trace(), reason="needs strace and the right to trace: apt-get install strace")


def run(program: str, *arguments: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", f"tests.{program}", "--keep", str(folder), *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        timeout=170,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_strace
def test_a_daemon_that_is_killed_anywhere_agrees_with_the_model(tmp_path: Path) -> None:
    assert "agreed with the model" in run("torture.kills", "--sample", "14", folder=tmp_path)


def test_damage_anywhere_is_found_and_named(tmp_path: Path) -> None:
    assert "all found or harmless" in run(
        "torture.damage", "--seed", "11", "--cut-every", "311", "--bits", "60", folder=tmp_path
    )


@needs_strace
def test_a_disk_that_fails_or_is_full_costs_nothing(tmp_path: Path) -> None:
    assert "agreed with the model" in run("torture.disk", "--sample", "1", folder=tmp_path)


def test_snapshots_and_compaction_leave_the_loop_to_others(tmp_path: Path) -> None:
    """The limit is on CPU time, which a busy machine does not stretch much; a tenth of the groups leaves it room."""
    assert "every callback took less" in run(
        "torture.scale", "--groups", "1000", "--large", "300", "--huge", "9", folder=tmp_path
    )


def test_a_short_day_leaves_no_descriptor_behind(tmp_path: Path) -> None:
    assert "hours of engines" in run("torture.day", "--minutes", "0.12", folder=tmp_path)
