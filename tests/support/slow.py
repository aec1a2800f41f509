"""Which tests ``scripts/test --quick`` leaves out: found by reading what a test can reach, so that nobody keeps a list.

Invariants:

* A test is slow if it stands in a folder of long runs, if it has asked for a longer deadline than all have, or if it
  can start a process: if its code, its fixtures, its parameters, or helpers of ``tests`` that these name, name a module
  that starts processes.
* What a test reaches by the package alone is not looked at: a pool of workers starts in a fraction of a second.
* Of a test with many sets of parameters, those beyond the first ``PARAMETER_SETS`` are slow.
"""

from __future__ import annotations

import inspect
from collections import Counter
from types import CodeType, FunctionType, ModuleType
from typing import Any

import pytest

from tests.support.paths import ROOT

FOLDERS_OF_LONG_RUNS = frozenset({"bench", "campaigns", "torture"})
STARTS_PROCESSES = frozenset({"subprocess", "multiprocessing", "playwright.async_api", "open_process", "run_process"})
"""Modules and functions, by the names that code uses for them."""

PARAMETER_SETS = 4
"""Enough to see most of what can break, of tests that have up to hundreds."""


def mark(items: list[pytest.Item]) -> None:
    """Give slow tests the marker ``slow``, and the first places, the longest before all.

    What begins last would otherwise run alone at the end, beside idle cores.
    """
    reach, sets = Reach(), Counter[str]()
    for item in items:
        name = item.nodeid.partition("[")[0]
        sets[name] += 1
        if _is_long(item) or sets[name] > PARAMETER_SETS or any(map(reach.starts_processes, _parts(item))):
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: (not _is_long(item), item.get_closest_marker("slow") is None))


def _is_long(item: pytest.Item) -> bool:
    own_deadline = item.get_closest_marker("timeout")
    return item.path.relative_to(ROOT / "tests").parts[0] in FOLDERS_OF_LONG_RUNS or (
        own_deadline is not None and own_deadline.args[0] > float(item.config.getini("timeout"))
    )


def _parts(item: pytest.Item) -> list[Any]:
    """What a test is made of: its function, its fixtures, its parameters."""
    if not isinstance(item, pytest.Function):
        return [type(item)]
    fixtures = item._fixtureinfo.name2fixturedefs.values()
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return [item.cls or item.function, *(fixture[-1].func for fixture in fixtures), *parameters]


class Reach:
    """Follows names; each object is looked at once."""

    def __init__(self) -> None:
        self._known: dict[int, bool] = {}
        self._kept: list[Any] = []  # so that no two of them have the same id

    def starts_processes(self, thing: Any) -> bool:
        """Whether a function, a class, a module, or something in a container can start a process."""
        if id(thing) not in self._known:
            self._kept.append(thing)
            self._known[id(thing)] = False  # for those that reach themselves
            self._known[id(thing)] = self._looked_at(thing)
        return self._known[id(thing)]

    def _looked_at(self, thing: Any) -> bool:
        if isinstance(thing, ModuleType):
            return thing.__name__ in STARTS_PROCESSES
        if isinstance(thing, dict):
            return any(map(self.starts_processes, thing.values()))
        if isinstance(thing, (list, tuple, set, frozenset)):
            return any(map(self.starts_processes, thing))
        if isinstance(thing, property):
            return self.starts_processes(thing.fget)
        if isinstance(thing, (staticmethod, classmethod)):
            return self.starts_processes(thing.__func__)
        if not getattr(thing, "__module__", None) or not str(thing.__module__).startswith("tests."):
            return False
        if isinstance(thing, type):
            return any(map(self.starts_processes, [*vars(thing).values(), *thing.__bases__]))
        function = inspect.unwrap(thing) if callable(thing) else thing
        return isinstance(function, FunctionType) and any(
            name in STARTS_PROCESSES or self.starts_processes(value) for name, value in _named(function)
        )


def _named(function: FunctionType) -> list[tuple[str, Any]]:
    """The names that a function's code uses, with what they mean in its module, or in modules of tests."""
    names, codes = set[str](), [function.__code__]
    while codes:
        code = codes.pop()
        names.update(code.co_names)
        codes.extend(constant for constant in code.co_consts if isinstance(constant, CodeType))
    values = [function.__globals__.get(name) for name in names]
    helpers = [value for value in values if isinstance(value, ModuleType) and value.__name__.startswith("tests.")]
    closed_over = [cell.cell_contents for cell in function.__closure__ or () if cell != type(cell)()]
    return [
        *zip(names, values, strict=True),
        *((name, vars(helper).get(name)) for helper in helpers for name in names),
        *(("", value) for value in closed_over),
    ]
