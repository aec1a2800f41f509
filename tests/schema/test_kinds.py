"""Every kind of engine, prompts and reward stands by itself: its spec beside its adapter, known to its registry alone.

Nothing here lists a kind. A new one is held to the same as soon as it is registered.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.engines.kinds import ENGINE_KINDS
from orchestrator.engines.spec import EngineSpec
from orchestrator.prompts.kinds import PROMPT_KINDS
from orchestrator.prompts.spec import PromptSpec
from orchestrator.rewards.kinds import REWARD_KINDS
from orchestrator.rewards.spec import RewardSpec
from orchestrator.schema.kinds import Kind
from tests.support.paths import ROOT

PORTS = {
    "engines": (ENGINE_KINDS, EngineSpec),
    "prompts": (PROMPT_KINDS, PromptSpec),
    "rewards": (REWARD_KINDS, RewardSpec),
}
SPECS = [(port, name, spec) for port, (kinds, _) in PORTS.items() for name, spec in kinds.specs.items()]
every_kind = pytest.mark.parametrize(("port", "name", "spec"), SPECS, ids=[f"{port}-{name}" for port, name, _ in SPECS])


def home(port: str, module: str) -> str:
    """The file or folder of a port in which a module is: ``sglang`` of ``orchestrator.engines.sglang.spec``."""
    assert module.startswith(f"orchestrator.{port}."), f"{module} is not in {port}/"
    return module.split(".")[2]


HOMES = {port: {home(port, spec.__module__) for spec in kinds.specs.values()} for port, (kinds, _) in PORTS.items()}


def files(path: Path) -> list[Path]:
    return [path.with_suffix(".py")] if path.with_suffix(".py").exists() else sorted(path.rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """What a file imports, as ``(module, name)``; relative imports made absolute."""
    package = ".".join(path.relative_to(ROOT).with_suffix("").parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((module, alias.name) for alias in node.names)


# -- one kind ---------------------------------------------------------------------------------------------------------


@every_kind
def test_a_kind_stands_in_a_file_or_folder_of_its_own(port: str, name: str, spec: type[Kind]) -> None:
    _, base = PORTS[port]
    assert issubclass(spec, base)
    assert not inspect.isabstract(spec), f"{spec.__name__} does not say how it is built"
    assert [other for _, other, twin in SPECS if twin is not spec and twin.__module__ == spec.__module__] == []
    if issubclass(spec, EngineSpec):
        adapter: Any = spec.adapter
        assert home(port, adapter.__module__) == home(port, spec.__module__), (
            "the spec does not stand beside the adapter"
        )


@every_kind
def test_a_kind_is_chosen_by_its_name_and_described(port: str, name: str, spec: type[Kind]) -> None:
    kinds, _ = PORTS[port]
    assert kinds.find({"kind": name}) is spec
    assert spec.model_fields["kind"].description
    documentation = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    assert re.search(rf"`kind: {name}`|\| `kind` \| `{name}` \|", documentation)


@every_kind
def test_a_kind_knows_neither_its_registry_nor_who_uses_it(port: str, name: str, spec: type[Kind]) -> None:
    used_by = {"engines": {"kinds", "pool"}}.get(port, {"kinds"})
    for path in files(ROOT / "orchestrator" / port / home(port, spec.__module__)):
        for module, imported in imports(path):
            if module.startswith(f"orchestrator.{port}"):
                parts = f"{module}.{imported}".split(".")
                assert parts[2] not in used_by, f"{path} imports {module}"


# -- everything else --------------------------------------------------------------------------------------------------


def elsewhere(port: str) -> list[Path]:
    """All modules of the daemon but those of the port itself; the demo and slime's side write configs."""
    package = ROOT / "orchestrator"
    away = {port, "demo", "slime"}
    return [path for path in package.rglob("*.py") if path.relative_to(package).parts[0] not in away]


@pytest.mark.parametrize("port", PORTS)
def test_nobody_else_knows_a_kind_by_its_module_or_class(port: str) -> None:
    for path in elsewhere(port):
        for module, name in imports(path):
            if f"{module}.".startswith(f"orchestrator.{port}."):
                found = getattr(importlib.import_module(module), name, None)
                homes = {f"{module}.{name}".split(".")[2], *getattr(found, "__module__", "").split(".")[2:3]}
                assert homes.isdisjoint(HOMES[port]), f"{path} imports {name} of {module}: ask the spec instead"


def test_nobody_else_knows_an_engine_by_the_text_of_its_kind() -> None:
    """As in ``kind == "sglang"``; kinds of prompts and rewards have names that other things have as well."""
    for path in elsewhere("engines"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert node.value not in ENGINE_KINDS.specs, f"{path}:{node.lineno} names an engine's kind"


WORKERS = {
    "orchestrator.rewards.service",
    "orchestrator.rewards.builtin.reasoning",
    "orchestrator.prompts.reasoning.worker",
}


def test_a_worker_process_loads_no_models_and_no_http_client() -> None:
    """Processes are started whenever one was killed; pydantic alone would double the time that takes."""
    program = f"import sys, {', '.join(WORKERS)}; print(*{{'pydantic', 'aiohttp'}} & sys.modules.keys())"
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=30, cwd=ROOT
    )
    assert answer.stdout.strip() == ""
