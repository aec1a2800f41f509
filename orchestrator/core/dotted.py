"""From a dotted path to the function it names.

Invariants:

* Only the importing of modules happens here: nothing that is found is called.
* The directory is put in front of ``sys.path`` at most once and stays there, because the module that is imported may
  import its neighbours later.
* Whatever goes wrong raises :class:`~orchestrator.errors.DottedPathError` that names the part which failed. An error
  inside the user's module is chained and named with file and line, never taken for a module that does not exist.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import pkgutil
import re
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from orchestrator.errors import DottedPathError

__all__ = ["resolve"]

MAX_PATH_CHARACTERS: Final = 256
"""Longer than any sensible path; keeps messages readable."""

_PATTERN: Final = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")


def resolve(path: str, *, directory: Path | None = None) -> Callable[..., Any]:
    """Import what a dotted path such as ``package.module.function`` names.

    The longest importable prefix is the module, the rest are attributes (``package.module.Class.method`` works). The
    last part is always an attribute, so that a function wins over a submodule of the same name.

    Args:
        path: at least two names, joined by dots.
        directory: where modules are looked up first; the working directory by default.

    Raises:
        DottedPathError: the path is malformed, a part of it is not found, what it names cannot be called, or the
            module raised when it was imported.
    """
    if len(path) > MAX_PATH_CHARACTERS or _PATTERN.fullmatch(path) is None:
        raise DottedPathError(f"{path[:80]!r} is not a dotted path: write package.module.function")
    directory = (directory or Path.cwd()).resolve()
    if str(directory) not in sys.path:
        sys.path.insert(0, str(directory))
    importlib.invalidate_caches()  # the file may be younger than the import system's view of its directory
    module, names = _import_prefix(path, directory)
    found: Any = module
    for i, name in enumerate(names):
        try:
            found = getattr(found, name)
        except AttributeError:
            raise _not_found(path, module, found, names[:i], name) from None
    if not callable(found):
        kind = "a module: name the function in it" if isinstance(found, ModuleType) else f"a {type(found).__name__}"
        raise DottedPathError(f"{path} is not callable, but {kind}")
    return found  # type: ignore[no-any-return]


def _import_prefix(path: str, directory: Path) -> tuple[ModuleType, list[str]]:
    """The module of the longest importable prefix, and the names after it (at least one)."""
    parts = path.split(".")
    module: ModuleType | None = None
    for count in range(1, len(parts)):
        name = ".".join(parts[:count])
        if name not in sys.modules and not _exists(name, module):
            if module is None:
                near = _near(name, _modules_in([str(directory)]))
                raise DottedPathError(f"{path}: there is no module {name} in {directory} or on Python's path{near}")
            return module, parts[count - 1 :]
        module = _import(path, name)
    if module is None:
        raise AssertionError("the pattern asks for two parts")
    return module, parts[-1:]


def _exists(name: str, parent: ModuleType | None) -> bool:
    if parent is not None and not hasattr(parent, "__path__"):
        return False
    return importlib.util.find_spec(name) is not None


def _import(path: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever the user's module raises is what has to be told
        raise DottedPathError(
            f"{path}: importing {name} failed{_place(error)}: {type(error).__name__}: {error}"
        ) from error


def _place(error: BaseException) -> str:
    """Where in the user's code an import failed: ``at file, line n``."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" at {error.filename}, line {error.lineno}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_machinery(frame.filename)]
    return f" at {frames[-1].filename}, line {frames[-1].lineno}" if frames else ""


def _is_machinery(filename: str) -> bool:
    return filename.startswith("<frozen importlib") or filename in (__file__, importlib.__file__)


def _not_found(path: str, module: ModuleType, holder: Any, before: list[str], name: str) -> DottedPathError:
    where = ".".join([module.__name__, *before])
    file = getattr(module, "__file__", None) or ", ".join(getattr(module, "__path__", ()))
    known = [known for known in dir(holder) if not known.startswith("_")]
    if isinstance(holder, ModuleType) and hasattr(holder, "__path__"):
        known += _modules_in(holder.__path__)
    return DottedPathError(f"{path}: {where} ({file}) has no {name}{_near(name, known)}")


def _modules_in(directories: Iterable[str]) -> list[str]:
    """Modules and packages that lie in some directories, packages without an ``__init__`` included."""
    directories = list(directories)
    folders = [
        path.name for directory in directories for path in Path(directory).glob("*/") if path.name.isidentifier()
    ]
    return folders + [found.name for found in pkgutil.iter_modules(directories)]


def _near(name: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, sorted(set(known)), n=3)
    return f"; did you mean {' or '.join(matches)}?" if matches else ""
