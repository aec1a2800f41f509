"""``docs/your-own-trainer.md`` and the trainer that it begins with: programs, on what a trainer needs and no more."""

from __future__ import annotations

import ast
import inspect
import re
import sys

import pytest

from orchestrator.client import Batch, RolloutClient
from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "your-own-trainer.md").read_text()
PROGRAMS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)

OURS = {"client": RolloutClient, "batch": Batch}


def test_there_are_two() -> None:
    assert len(PROGRAMS) == 2


def attributes(owner: type) -> set[str]:
    """Methods, properties and what the constructor sets."""
    set_by_init = re.findall(r"self\.(\w+) = ", inspect.getsource(owner))
    return {name for name in {*dir(owner), *set_by_init} if not name.startswith("_")}


@pytest.mark.parametrize("program", PROGRAMS)
def test_it_calls_what_is_there_with_what_it_takes(program: str) -> None:
    tree = ast.parse(program)
    used = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in OURS:
            assert node.attr in attributes(OURS[node.value.id]), f"{node.value.id}.{node.attr}"
            used += 1
        if not isinstance(node, ast.Call):
            continue
        match node.func:
            case ast.Attribute(value=ast.Name(id=("client" | "batch") as owner), attr=name):
                function = getattr(OURS[owner], name)
            case ast.Name(id="RolloutClient"):
                function = RolloutClient
            case _:
                continue
        if function is Batch.to_torch:
            function = Batch.padded  # which it hands its options to
        arguments = [None] * (len(node.args) + (function is not RolloutClient))
        inspect.signature(function).bind(*arguments, **{word.arg: None for word in node.keywords if word.arg})
    assert used >= 6


@pytest.mark.parametrize("program", PROGRAMS)
def test_what_it_imports_of_this_project_is_there(program: str) -> None:
    for imported in re.findall(r"^from (orchestrator\S*) import (.*)$", program, re.MULTILINE):
        module = __import__(imported[0], fromlist=["*"])
        assert all(hasattr(module, name.strip()) for name in imported[1].split(","))


def imports(program: str) -> set[str]:
    """The modules that a program names at its top, those of its own folder aside."""
    found = set()
    for node in ast.parse(program).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module or "")
    return {name for name in found if name.partition(".")[0] not in sys.stdlib_module_names}


def test_the_trainer_of_the_first_run_needs_the_client_alone_of_this_project() -> None:
    folder = ROOT / "examples" / "curriculum_learning"
    used = {name for file in ("trainer.py", "tiny_llama.py") for name in imports((folder / file).read_text())}
    assert used == {"orchestrator.client", "orchestrator.errors", "numpy", "autograd", "autograd.numpy", "gguf"}


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_programs_need_it_and_torch_and_transformers(program: str) -> None:
    ours = {name for name in imports(program) if name.startswith("orchestrator")}
    assert ours == {"orchestrator.client", "orchestrator.errors"}
    assert {name.partition(".")[0] for name in imports(program) - ours} == {"torch", "transformers"}
