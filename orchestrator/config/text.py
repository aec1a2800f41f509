"""From the bytes of a config file to plain data that remembers on which line each key stands.

Invariants:

* What leaves here is built of mappings, lists, numbers, text, ``true``/``false`` and ``null``; tags that would build
  anything else are refused by the parser.
* Every limit is checked before the work that it bounds: bytes before parsing, nodes before constructing. Aliases count
  as often as they are used, so that a few lines cannot stand for millions of values.
* What cannot be read at all is raised at once as :class:`~orchestrator.errors.ConfigError`; what can be read past
  (duplicate keys, keys that are not text) is listed beside the data, so that the user sees all problems together.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, ReusedAnchorWarning, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from orchestrator.errors import ConfigError, ConfigProblem

__all__ = ["ConfigText", "Finding", "Location", "key_path", "read_text"]

Location = tuple[str | int, ...]
"""Keys and list positions from the top of the file: ``("data_sources", 1, "prompts", "path")``."""

MAX_FILE_BYTES: Final = 1 << 20
"""1 MiB: a thousand sources, fully written out, take half of it; a data file given by mistake is turned away."""

MAX_NODES: Final = 100_000
"""Keys and values, aliases counted as often as they are used; what 1 MiB of honest YAML holds at most."""

MAX_DEPTH: Final = 50
"""Levels of nesting; the deepest key of the config stands on the fifth."""

UNFIT: Final = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""What the parser lets through from Python where a value is none of its type: a 13th month, ``!!bool x``."""

STRING_TAG: Final = "tag:yaml.org,2002:str"
MERGE_TAG: Final = "tag:yaml.org,2002:merge"


def key_path(location: Location) -> str:
    """``data_sources[1].prompts.path``."""
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


class Finding(NamedTuple):
    """One thing that is wrong, before it is known on which line: where, what, and what would be right."""

    location: Location
    message: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class ConfigText:
    """A config file as read.

    ``data`` is the top mapping; ``lines`` has the line, from 1, of every key and list item; ``problems`` are those
    that did not keep the file from being read.
    """

    file: str
    data: dict[str, Any]
    lines: dict[Location, int] = field(default_factory=dict)
    problems: list[ConfigProblem] = field(default_factory=list)

    def line_of(self, location: Location) -> int | None:
        """The line of that key, or of the nearest one above it that the file has."""
        for end in range(len(location), 0, -1):
            if (line := self.lines.get(location[:end])) is not None:
                return line
        return None


def read_text(path: Path) -> ConfigText:
    """Read and parse a config file.

    Raises:
        ConfigError: the file cannot be read, is too large, not UTF-8, not YAML, or not a mapping at the top.
    """
    file = str(path)
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise _refusal(file, f"cannot read the config file: {error.strerror}") from error
    if len(content) > MAX_FILE_BYTES:
        raise _refusal(file, f"the file has more than {MAX_FILE_BYTES} bytes; is this a config file?")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = content[error.start]
        raise _refusal(file, f"byte 0x{byte:02x} is not UTF-8", line, "save the file as UTF-8") from None
    return _parse(file, text)


def _parse(file: str, text: str) -> ConfigText:
    yaml = YAML(typ="safe", pure=True)
    yaml.allow_duplicate_keys = True  # reported by the walk, all of them and with their lines
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ReusedAnchorWarning)  # YAML allows it
            walk = _Walk(file)
            walk.visit_document(yaml.compose(text))
            data = yaml.load(text)
    except ConfigError:
        raise
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark is not None else None
        problem = error.problem or error.context or "cannot be parsed"
        hint = "indent with spaces" if "'\\t'" in problem else ""
        raise _refusal(file, f"this is not YAML: {problem}", line, hint) from error
    except YAMLError as error:
        raise _refusal(file, f"this is not YAML: {str(error).splitlines()[0]}") from error
    except UNFIT as error:
        raise _refusal(
            file, f"a value does not fit its type: {error}", hint="put it in quotes if it is a string"
        ) from error
    except RecursionError:
        raise _too_deep(file) from None
    return ConfigText(file, data, walk.lines, walk.problems)


def _refusal(file: str, message: str, line: int | None = None, hint: str = "") -> ConfigError:
    return ConfigError(file, [ConfigProblem(key="", message=message, line=line, hint=hint)])


def _too_deep(file: str, line: int | None = None) -> ConfigError:
    return _refusal(file, f"the file is nested more than {MAX_DEPTH} levels deep", line)


class _Walk:
    """Visits every node once for each place where it is used."""

    def __init__(self, file: str) -> None:
        self.lines: dict[Location, int] = {}
        self.problems: list[ConfigProblem] = []
        self._file = file
        self._nodes = 0

    def visit_document(self, root: Node | None) -> None:
        if root is None:
            raise _refusal(self._file, "the file is empty", hint="start from config/minimal.yaml")
        if not isinstance(root, MappingNode):
            what = "a list" if isinstance(root, SequenceNode) else "a single value"
            raise _refusal(self._file, f"the top level is {what}", 1, "expected keys such as `engines:`")
        self.visit(root, (), 0)

    def visit(self, node: Node, at: Location, depth: int) -> None:
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise _refusal(self._file, f"the file expands to more than {MAX_NODES} values; check its aliases")
        if depth > MAX_DEPTH:
            raise _too_deep(self._file, _line(node))
        if isinstance(node, ScalarNode):
            self._check_text(node)
        elif isinstance(node, SequenceNode):
            for index, item in enumerate(node.value):
                self.lines.setdefault((*at, index), _line(item))
                self.visit(item, (*at, index), depth + 1)
        elif isinstance(node, MappingNode):
            self._visit_mapping(node, at, depth)

    def _visit_mapping(self, node: MappingNode, at: Location, depth: int) -> None:
        seen: dict[str, int] = {}
        for key, value in _merged_last(node):
            if key.tag == MERGE_TAG:
                for mapping in value.value if isinstance(value, SequenceNode) else [value]:
                    self.visit(mapping, at, depth + 1)
                continue
            if not isinstance(key, ScalarNode) or key.tag != STRING_TAG:
                shown = key.value if isinstance(key, ScalarNode) else "a list or mapping"
                self._report(at, key, f"the key {shown} is not a string", "put it in quotes if it is intended")
                continue
            self._check_text(key)
            here = (*at, key.value)
            if key.value in seen:
                self._report(here, key, f"the key is given twice, first on line {seen[key.value]}", "keep only one")
            seen.setdefault(key.value, _line(key))
            self.lines.setdefault(here, _line(key))
            self.visit(value, here, depth + 1)

    def _check_text(self, node: ScalarNode) -> None:
        r"""Refuse halves of characters (``"\ud800"``): such a text can be neither printed nor written anywhere."""
        try:
            node.value.encode()
        except UnicodeEncodeError:
            hint = r"write \UXXXXXXXX instead of a pair of \u escapes"
            raise _refusal(self._file, "an escape is half of a character", _line(node), hint) from None

    def _report(self, at: Location, node: Node, message: str, hint: str) -> None:
        self.problems.append(ConfigProblem(key_path(at), message, _line(node), hint))


def _merged_last(node: MappingNode) -> Iterator[tuple[Node, Node]]:
    """The pairs of a mapping; ``<<`` comes last, because a mapping's own keys win over merged ones."""
    yield from (pair for pair in node.value if pair[0].tag != MERGE_TAG)
    yield from (pair for pair in node.value if pair[0].tag == MERGE_TAG)


def _line(node: Node) -> int:
    return int(node.start_mark.line) + 1
