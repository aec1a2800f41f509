"""The package as it is installed: metadata, the wheel, the pinned versions."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from orchestrator import __version__
from orchestrator.cli import exit_codes
from tests.support.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def normal(name: str) -> str:
    """A distribution's name as indices compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements() -> dict[str, tuple[int, ...]]:
    """Every direct dependency with its lower bound, extras and development tools included."""
    groups = [
        PROJECT["project"]["dependencies"],
        *PROJECT["project"]["optional-dependencies"].values(),
        *PROJECT["dependency-groups"].values(),
    ]
    found = {}
    for text in (text for group in groups for text in group):
        match = re.fullmatch(r"([A-Za-z0-9._-]+)>=([0-9.]+)", text)
        assert match, f"{text}: a name and a lower bound are expected"
        found[normal(match[1])] = version(match[2])
    return found


def version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text))


def pins() -> dict[str, tuple[int, ...]]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert all(len(pair) == 2 for pair in pinned), "every line pins one version, and names no place"
    return {normal(name): version(text) for name, text in pinned}


def test_every_direct_dependency_is_pinned_within_its_bound() -> None:
    pinned = pins()
    assert [name for name, least in requirements().items() if pinned.get(name, ()) < least] == []


def test_the_console_script_leads_to_a_function() -> None:
    module, _, name = PROJECT["project"]["scripts"]["orchestrator"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))


def test_exit_codes_are_those_that_are_documented() -> None:
    codes = {name: getattr(exit_codes, name) for name in exit_codes.__all__}
    assert codes == {"OK": 0, "FAILED": 1, "USAGE": 2, "TAKEN": 75, "BAD_CONFIG": 78}


def test_the_wheel_has_the_package_whole_and_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="the development tools are not installed")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path],
        check=True, cwd=ROOT, timeout=50, capture_output=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"rollout_orchestrator-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        described = archive.read(metadata).decode()
        licences = [name for name in archive.namelist() if name.endswith("licenses/LICENSE")]
    files = [path for path in (ROOT / "orchestrator").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert {path.relative_to(ROOT).as_posix() for path in files} <= names
    assert "orchestrator/py.typed" in names
    assert {name.partition("/")[0] for name in names} == {"orchestrator"}
    assert "License-Expression: Apache-2.0" in described
    assert len(licences) == 1


def test_the_image_is_built_from_what_the_wheel_needs() -> None:
    """`.dockerignore` lets in everything that the Dockerfile copies, and pyproject.toml needs."""
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied: set[str] = set()
    for line in (ROOT / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY ") and "--from" not in line:
            copied.update(line.split()[1:-1])
    assert copied == allowed
    assert {PROJECT["project"]["readme"], *PROJECT["project"]["license-files"], "pyproject.toml"} <= copied
    assert all((ROOT / name).exists() for name in copied)


# -- what an installation needs no longer ------------------------------------------------------------------------------


def slim(environment: Path) -> str:
    """What ``scripts/_slim.py`` says."""
    command = [sys.executable, str(ROOT / "scripts" / "_slim.py"), str(environment)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stderr


def test_compiled_files_end_where_what_is_loaded_of_them_ends(tmp_path: Path) -> None:
    from uvloop import loop

    assert loop.__file__ is not None
    library = tmp_path / Path(loop.__file__).name
    shutil.copy(loop.__file__, library)
    slim(tmp_path)
    needed = library.read_bytes()
    library.write_bytes(needed + bytes(2 << 20))  # what lies behind the last segment, as debug information does
    assert slim(tmp_path).startswith("cut 2 MB")
    assert library.read_bytes() == needed
    assert slim(tmp_path) == ""
    subprocess.run([sys.executable, "-c", f"import ctypes; ctypes.CDLL({str(library)!r})"], check=True, timeout=30)


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    for name, content in (("text.so", b"INPUT(libc.so.6)"), ("torn.so", b"\x7fELF\x02\x01"), ("zeros.so", b"")):
        (tmp_path / name).write_bytes(content + bytes(2 << 20))
    assert slim(tmp_path) == ""
    assert {path.stat().st_size for path in tmp_path.iterdir()} >= {2 << 20, (2 << 20) + 6}
