"""What the layers may use, as far as import-linter cannot say it: allow-lists, and what is done without an import.

Which folder may import which is in ``.importlinter``. Here are the promises about the world outside of the package.
"""

from __future__ import annotations

import ast
import configparser
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PACKAGE = ROOT / "orchestrator"

VOCABULARY = ("errors", "records", "frames")
VOCABULARY_MAY_IMPORT = {"numpy", "orjson"}
"""orjson where it is installed."""

READ_A_CLOCK_OR_A_FILE = {"open", "input", "print", "exec", "eval", "__import__"}


def decisions() -> list[str]:
    """What ``.importlinter`` holds to deciding alone."""
    contracts = configparser.ConfigParser()
    contracts.read(ROOT / ".importlinter")
    listed = contracts["importlinter:contract:decisions"]["source_modules"].split()
    assert "orchestrator.core" in listed
    return sorted(name.removeprefix("orchestrator.") for name in listed)


def files(part: str) -> list[Path]:
    module = PACKAGE / f"{part}.py"
    return [module] if module.exists() else sorted((PACKAGE / part).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """The top-level names of everything imported from outside of the package, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield (node.module or "").split(".")[0]


def foreign(path: Path) -> set[str]:
    return set(imports(path)) - set(sys.stdlib_module_names) - {"orchestrator"}


@pytest.mark.parametrize("part", VOCABULARY)
def test_the_vocabulary_imports_the_standard_library_and_numpy_alone(part: str) -> None:
    (path,) = files(part)
    assert foreign(path) <= VOCABULARY_MAY_IMPORT


def test_the_trainer_library_names_few_others() -> None:
    """anyio in its asynchronous half, and torch where a trainer asks for tensors; the next test holds the rest."""
    found = {path.name: foreign(path) for path in files("client")}
    assert found, "the trainer's library is gone"
    assert found.pop("asynchronous.py") <= {"anyio", "numpy"}
    assert set().union(*found.values()) <= VOCABULARY_MAY_IMPORT | {"torch"}


def test_a_trainer_without_any_of_our_dependencies_can_import_its_library() -> None:
    """In a process where nothing but numpy and the standard library can be imported."""
    program = """
import sys

class OnlyNumpy:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in sys.stdlib_module_names | {"orchestrator", "numpy"}:
            raise ImportError(f"{name} is not installed at the trainer's")

sys.meta_path.insert(0, OnlyNumpy())
from orchestrator.client import RolloutClient
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=30, cwd=ROOT)


@pytest.mark.parametrize("part", decisions())
def test_decisions_neither_wait_nor_read_nor_write(part: str) -> None:
    for path in files(part):
        for node in ast.walk(ast.parse(path.read_text())):
            assert not isinstance(node, ast.Await | ast.AsyncFor | ast.AsyncWith), f"{path.name}:{node.lineno} waits"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in READ_A_CLOCK_OR_A_FILE, f"{path.name}:{node.lineno} calls {node.func.id}"


def test_no_pickle_and_no_shell_anywhere() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert not {"pickle", "marshal", "shelve"} & set(imports(path)), path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                for keyword in node.keywords:
                    is_shell = keyword.arg == "shell" and getattr(keyword.value, "value", None) is not False
                    assert not is_shell, f"{path}:{node.lineno} starts a shell"
