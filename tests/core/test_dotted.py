"""Dotted paths: what they find, and what they say when they do not."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.core.dotted import resolve
from orchestrator.errors import DottedPathError


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Path]:
    """A user's directory; what was imported from it is forgotten afterwards."""
    path, modules = list(sys.path), set(sys.modules)
    files = {
        "user_project/__init__.py": "from .score import score\n",
        "user_project/score.py": (
            "def score(x):\n    return x\n\nclass Table:\n    @staticmethod\n    def look_up(x):\n        return -x\n"
        ),
        "user_project/broken.py": "\n\nx = 1 / 0\n",
        "user_project/unparsable.py": "def f(:\n",
        "user_project/needs.py": "import not_installed_anywhere\n",
        "user_project/leaves.py": "raise SystemExit(3)\n",
        "user_space/inner/weights.py": "def flat(step):\n    return 1.0\n\nnumber = 3\n",
        "user_single.py": "def f():\n    return 'single'\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    yield tmp_path
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if name.startswith("user_"):
            del sys.modules[name]


def test_functions_in_modules_packages_and_classes(project: Path) -> None:
    assert resolve("user_single.f", directory=project)() == "single"
    assert resolve("user_space.inner.weights.flat", directory=project)(0) == 1.0
    assert resolve("user_project.score.Table.look_up", directory=project)(2) == -2
    assert resolve("math.exp")(0) == 1.0


def test_a_function_wins_over_a_submodule_of_its_name(project: Path) -> None:
    assert resolve("user_project.score", directory=project)(5) == 5


def test_the_working_directory_is_the_default(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    assert resolve("user_single.f")() == "single"


def test_the_directory_is_put_in_front_once_and_stays(project: Path) -> None:
    for _ in range(3):
        resolve("user_single.f", directory=project)
    assert sys.path[0] == str(project.resolve())
    assert sys.path.count(str(project.resolve())) == 1


def test_a_module_written_just_now_is_found(project: Path) -> None:
    with pytest.raises(DottedPathError):
        resolve("user_late.f", directory=project)
    (project / "user_late.py").write_text("def f():\n    return 'late'\n")
    assert resolve("user_late.f", directory=project)() == "late"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("user_singel.f", r"there is no module user_singel in .*; did you mean user_single"),
        ("user_single.g", r"user_single \(.*user_single.py\) has no g"),
        ("user_project.scor.f", r"user_project \(.*\) has no scor; did you mean score\?"),
        ("user_space.iner.weights.flat", r"user_space \(.*user_space\) has no iner; did you mean inner\?"),
        ("user_space.inner.weights.flatt", r"weights \(.*\) has no flatt; did you mean flat\?"),
        ("user_project.score.Table.look", r"score.Table \(.*\) has no look; did you mean look_up\?"),
        ("user_space.inner.weights.number", "is not callable, but a int"),
        ("user_project.broken", "has no broken|is not callable, but a module"),
    ],
)
def test_errors_name_the_part_and_what_is_near(project: Path, path: str, message: str) -> None:
    with pytest.raises(DottedPathError, match=message) as caught:
        resolve(path, directory=project)
    assert caught.value.message.startswith(path)


def test_naming_a_module_asks_for_the_function(project: Path) -> None:
    resolve("user_space.inner.weights.flat", directory=project)
    with pytest.raises(DottedPathError, match="but a module: name the function in it"):
        resolve("user_space.inner.weights", directory=project)


@pytest.mark.parametrize(
    ("path", "cause", "message"),
    [
        (
            "user_project.broken.f",
            ZeroDivisionError,
            r"importing user_project.broken failed at .*broken.py, line 3: Zero",
        ),
        ("user_project.unparsable.f", SyntaxError, r"failed at .*unparsable.py, line 1: SyntaxError"),
        ("user_project.needs.f", ModuleNotFoundError, r"failed at .*needs.py, line 1: .*not_installed_anywhere"),
        ("user_project.leaves.f", SystemExit, r"failed at .*leaves.py, line 1: SystemExit: 3"),
    ],
)
def test_errors_of_the_module_are_told_and_chained(
    project: Path, path: str, cause: type[BaseException], message: str
) -> None:
    with pytest.raises(DottedPathError, match=message) as caught:
        resolve(path, directory=project)
    assert isinstance(caught.value.__cause__, cause)


@pytest.mark.parametrize("path", ["", "f", ".f", "a.", "a..b", "a.b c", "a/b.c", "1.2", "a." + "b" * 300, "a.b\n"])
def test_malformed_paths(path: str) -> None:
    with pytest.raises(DottedPathError, match=r"is not a dotted path: write package\.module\.function"):
        resolve(path)
