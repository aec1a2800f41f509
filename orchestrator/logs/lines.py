"""From an event to the bytes of one line: ECS JSON, or text for a terminal.

Invariants:

* Every JSON line is one valid JSON object of at most ``MAX_LINE_BYTES``, whatever the input: values that JSON does not
  have become text, NaN and infinities become null. Nothing here raises.
* ``@timestamp``, ``log.level`` and ``message`` come first. ``log.level`` is the one dotted key, as in the ECS logging
  specification; everything else is nested objects, also where the caller wrote ``source.name``.
* No name is both a leaf and an object within a line; Elasticsearch would refuse the second.
* ``event.id`` is unique over all lines of all processes: shipping a line twice indexes it once.
"""

from __future__ import annotations

import itertools
import secrets
import sys
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

import orjson
import structlog
from structlog.typing import EventDict

__all__ = ["MAX_LINE_BYTES", "ConsoleLines", "EcsLines"]

ECS_VERSION: Final = "8.11.0"
"""The version of the Elastic Common Schema whose field names are used."""

MAX_LINE_BYTES: Final = 256 << 10
"""256 KiB: far above any line of ours, and far below the 10 MiB at which shippers cut. A longer line keeps its head."""

MAX_DEPTH: Final = 6
"""Levels of nesting that are kept where fields have to be converted for JSON; deeper levels become text."""

CUT_CHARACTERS: Final = 4096
"""What is left of each text of a line that was too long: the beginning of a message, the end of a traceback."""

_JSON_OPTIONS: Final = (
    orjson.OPT_NON_STR_KEYS | orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_UTC_Z | orjson.OPT_APPEND_NEWLINE
)

_HEAD: Final = frozenset({"@timestamp", "log.level", "message"})
"""Keys of a line that a caller's field cannot replace; such a field goes to ``labels``."""

_LEAVES: Final = {
    "action": "event.action",
    "engine": "engine.name",
    "error": "error.message",
    "pid": "process.pid",
    "service": "service.name",
    "source": "source.name",
}
"""Short names that callers use with a plain value, and the fields that they stand for."""


class EcsLines:
    """A structlog processor that ends the chain: events in, JSON lines out.

    Args:
        service: ``service.name`` of every line.
        run: ``labels.run`` of every line; ``None`` for none.
    """

    def __init__(self, service: str, run: str | None = None) -> None:
        self._service = service
        self._run = {} if run is None else {"run": run}
        self._process = secrets.token_hex(8)
        self._numbers = itertools.count()

    def __call__(self, logger: Any, method: str, event: EventDict) -> bytes:
        """One line, including its line end."""
        message = _to_text(event.pop("event", ""))
        error = _error_of(event.pop("exc_info", None))
        line = self._head(method, message, event.pop("dataset", "orchestrator"))
        if error is not None:
            line["error"] = _describe(error)
        for key, value in event.items():
            _put(line, key, value)
        text = _encode(line)
        return text if len(text) <= MAX_LINE_BYTES else self._cut(line, len(text))

    def _head(self, method: str, message: str, dataset: str) -> dict[str, Any]:
        head: dict[str, Any] = {
            "@timestamp": datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z"),
            "log.level": method,
            "message": message,
            "ecs": {"version": ECS_VERSION},
            "service": {"name": self._service},
            "event": {"dataset": dataset, "id": f"{self._process}-{next(self._numbers):x}"},
        }
        if self._run:
            head["labels"] = {**self._run}
        return head

    def _cut(self, line: dict[str, Any], size: int) -> bytes:
        """The line without its fields: the beginning of its message and the end of its traceback."""
        message = f"{line['message'][:CUT_CHARACTERS]} … (cut: this line had {size} bytes)"
        head = self._head(line["log.level"], message, _to_text(line["event"]["dataset"]))
        if "error" in line:
            head["error"] = {key: _to_text(value)[-CUT_CHARACTERS:] for key, value in line["error"].items()}
        return _encode(head)


class ConsoleLines:
    """A structlog processor that ends the chain: events in, lines for a terminal out. Objects are left out."""

    def __init__(self, *, colors: bool) -> None:
        self._renderer = structlog.dev.ConsoleRenderer(colors=colors, pad_event_to=0)

    def __call__(self, logger: Any, method: str, event: EventDict) -> bytes:
        """One line, including its line end; more if there is a traceback."""
        error = _error_of(event.get("exc_info"))
        shown: EventDict = {
            key: value if isinstance(value, int | float) else _printable(_to_text(value))
            for key, value in event.items()
            if not isinstance(value, Mapping) and key != "exc_info"
        }
        shown["timestamp"] = datetime.now().astimezone().strftime("%H:%M:%S")
        shown["level"] = method
        shown["logger"] = shown.pop("dataset", "orchestrator")
        text = str(self._renderer(logger, method, shown))
        if error is not None:
            text += "\n" + _printable(_describe(error)["stack_trace"].rstrip())
        return (text + "\n").encode("utf-8", "backslashreplace")


def _put(line: dict[str, Any], key: str, value: Any) -> None:
    """Set ``a.b.c`` in nested objects; a leaf in the place of an object becomes ``value`` inside that object."""
    if key in _HEAD:
        key = f"labels.{key.replace('.', '_')}"
    elif not isinstance(value, Mapping):
        key = _LEAVES.get(key, key)
    *parents, leaf = key.split(".")
    place = line
    for parent in parents:
        inner = place.setdefault(parent, {})
        if not isinstance(inner, dict):
            inner = place[parent] = {"value": inner}
        place = inner
    old = place.get(leaf)
    if isinstance(value, Mapping):
        place[leaf] = {**(old if isinstance(old, dict) else {} if old is None else {"value": old}), **value}
    elif isinstance(old, dict):
        place[leaf] = {**old, "value": value}
    else:
        place[leaf] = value


def _error_of(exc_info: Any) -> BaseException | None:
    """The exception that ``exc_info`` stands for, in any form that ``logging`` and structlog accept."""
    if isinstance(exc_info, BaseException):
        return exc_info
    if isinstance(exc_info, tuple):
        return exc_info[1] if len(exc_info) == 3 and isinstance(exc_info[1], BaseException) else None
    return sys.exc_info()[1] if exc_info else None


def _describe(error: BaseException) -> dict[str, str]:
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    try:
        trace = "".join(traceback.format_exception(error))
    except Exception as failure:  # noqa: BLE001 - an error that cannot be printed must not end what logs it
        trace = f"cannot be shown: {type(failure).__name__}"
    return {"type": name, "message": _to_text(error), "stack_trace": trace}


def _encode(line: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(line, default=_to_text, option=_JSON_OPTIONS)
    except (TypeError, ValueError):  # surrogates, integers beyond 64 bits, circles
        return orjson.dumps(_plain(line, MAX_DEPTH), option=_JSON_OPTIONS)


def _plain(value: Any, depth: int) -> Any:
    """A copy of the value that JSON can represent."""
    if value is None or isinstance(value, bool | float):
        return value
    if isinstance(value, int) and -(1 << 63) <= value < 1 << 64:
        return int(value)
    if depth and isinstance(value, Mapping):
        return {_to_text(key): _plain(part, depth - 1) for key, part in value.items()}
    if depth and isinstance(value, list | tuple | set | frozenset):
        return [_plain(part, depth - 1) for part in value]
    return _to_text(value)


def _to_text(value: Any) -> str:
    try:
        return str(value).encode("utf-8", "backslashreplace").decode()
    except Exception as failure:  # noqa: BLE001 - whatever a foreign __str__ does, the line is written
        return f"<{type(value).__name__} without text: {type(failure).__name__}>"


def _printable(text: str) -> str:
    """The text without control characters: messages may quote what an engine or a client sent."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
