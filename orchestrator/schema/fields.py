"""Types of single values that several sections share: paths, names, addresses, weights.

Invariants:

* A value is taken or refused as it stands: no text becomes a number, no number a text, no ``true`` a 1.
* Relative paths become absolute here, against the directory in the validation context (that of the config file).
* Nothing is opened, imported or connected to.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from collections.abc import Iterable
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Final
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationInfo
from pydantic import WithJsonSchema as Schema
from pydantic_core import PydanticCustomError

from orchestrator.core.weights.expressions import compile_expression
from orchestrator.errors import ExpressionError

from .keys import key_problem

__all__ = [
    "Bytes",
    "Count",
    "FilePath",
    "HostPort",
    "NonNegative",
    "NonNegativeSeconds",
    "Probability",
    "Seconds",
    "Section",
    "ServerUrl",
    "SourceName",
    "WeightText",
    "absolute_path",
    "as_written",
    "check_host",
    "is_dotted_path",
    "key_variable",
    "list_of",
    "nearest",
    "problem",
    "shown",
    "subsection",
]

NAME_PATTERN: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
DOTTED_PATTERN: Final = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
HOST_PORT_PATTERN: Final = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+):(\d{1,5})")
MAX_PORT: Final = 65_535
LABEL_PATTERN: Final = re.compile(r"[A-Za-z0-9_-]{1,63}")
MAX_HOST_CHARS: Final = 253


class Section(BaseModel):
    """What all parts of the config have in common: unknown keys are errors, nothing is coerced, nothing changes."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True, protected_namespaces=()
    )


def subsection(description: str) -> Any:
    """A section that may be left out; it is made when a config is loaded, when its relative paths have a meaning."""
    return Field(default_factory=dict, description=description)


def as_written(default: str, description: str) -> Any:
    """A key whose default is text as a file would have it, validated like text of a file."""
    return Field(default, description=description)


def problem(message: str, hint: str = "", *, at: tuple[str, ...] = ()) -> PydanticCustomError:
    """An error of ours inside validation.

    Args:
        message: reads after the key.
        hint: says what would be right.
        at: the keys that lead from the value which is validated to the one that is wrong.
    """
    return PydanticCustomError("config", "{message}", {"message": message, "hint": hint, "at": at})


def shown(value: Any) -> str:
    """A value as the user may have written it, at most 60 characters; containers by their kind."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        quoted = json.dumps(value[:60] + "…" * (len(value) > 60), ensure_ascii=False)
        # A message is one line, also to readers for whom U+0085 and U+2028 end one.
        return f"the string {''.join(c if c.isprintable() else json.dumps(c)[1:-1] for c in quoted)}"
    return str(value)[:60]


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that is most like the given one, if any is."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None


def is_dotted_path(text: str) -> bool:
    """Whether the text has the form ``package.module.function``."""
    return DOTTED_PATTERN.fullmatch(text) is not None


# -- paths ------------------------------------------------------------------------------------------------------------


def absolute_path(value: Any, info: ValidationInfo) -> Any:
    """The path that a text of the config names, against the directory of the config file."""
    if not isinstance(value, str | Path):
        raise problem(f"expected the path of a file, got {shown(value)}", "write it as a string")
    text = str(value)
    if not text.strip() or "\0" in text:
        raise problem("the path is empty or has a zero byte", "name a file")
    directory: Path = (info.context or {}).get("directory", Path.cwd())
    try:
        path = Path(text).expanduser()
    except RuntimeError as error:
        raise problem(f"got {text!r}: {error}", "write the path without ~") from error
    return Path(os.path.normpath(directory / path))


FilePath = Annotated[Path, BeforeValidator(absolute_path, json_schema_input_type=str), Schema({"type": "string"})]
"""A path; relative ones are relative to the config file, ``~`` is the home directory."""


# -- names and addresses ----------------------------------------------------------------------------------------------


def _source_name(value: str) -> str:
    if NAME_PATTERN.fullmatch(value) is None:
        raise problem(
            f"{value!r} cannot be a name",
            "use 1 to 64 of A-Z a-z 0-9 _ . -, starting with a letter, a digit or _",
        )
    return value


SourceName = Annotated[str, AfterValidator(_source_name), Field(json_schema_extra={"pattern": NAME_PATTERN.pattern})]
"""A name that is safe in metric names and paths."""


def check_host(host: str) -> None:
    """Raise a problem unless this can be the name or address of a host."""
    try:
        ip_address(host)
    except ValueError:
        pass
    else:
        return
    try:
        encoded = host if host.isascii() else host.encode("idna").decode()
    except UnicodeError as error:
        raise problem(f"{host!r} cannot be the name of a host: {error}", "write the name of a host") from error
    labels = encoded.removesuffix(".").split(".")
    if len(encoded) > MAX_HOST_CHARS or not all(LABEL_PATTERN.fullmatch(label) for label in labels):
        raise problem(
            f"{host!r} cannot be the name of a host",
            "a name is made of labels of 1 to 63 letters, digits, - and _, with one dot between two",
        )


def _server_url(value: str) -> str:
    right = 'write "http://HOST:PORT"'
    try:
        parts = urlsplit(value)
        port = parts.port
    except ValueError as error:
        raise problem(f"{value!r} is not a URL: {error}", right) from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise problem(f"{value!r} is not the URL of a server", right)
    if re.search(r"\s", value) or port == 0:
        raise problem(f"{value!r} is not the URL of a server", right)
    if parts.username is not None or parts.password is not None:
        raise problem("a URL with a user name or password would show them in logs", right)
    check_host(parts.hostname)
    if parts.path not in ("", "/") or parts.query or parts.fragment or value.endswith(("?", "#")):
        raise problem(f"{value!r} has more than a host and a port", f"{right}; the adapter adds the paths it needs")
    return f"{parts.scheme}://{parts.netloc}"


ServerUrl = Annotated[str, AfterValidator(_server_url)]
"""``http://host:port`` or ``https://host:port``, without a path."""


def _host_port(value: Any) -> Any:
    right = 'write "127.0.0.1:8642", or null to switch it off'
    if not isinstance(value, str):
        raise problem(f"expected host:port, got {shown(value)}", right)
    match = HOST_PORT_PATTERN.fullmatch(value)
    if match is None or not 1 <= int(match[2]) <= MAX_PORT:
        raise problem(f"{value!r} is not a host and a port from 1 to {MAX_PORT}", right)
    return value


def key_variable(value: str) -> str:
    """The name of an environment variable whose value, where it is set here, can be a key."""
    if (wrong := key_problem(value)) is not None:
        raise problem(wrong, "write the key alone into it")
    return value


HostPort = Annotated[str, BeforeValidator(_host_port, json_schema_input_type=str)]
"""``host:port``; an IPv6 address stands in brackets."""


# -- numbers ----------------------------------------------------------------------------------------------------------

Count = Annotated[int, Field(ge=1, le=1_000_000_000)]
"""A whole number of at least 1."""

Bytes = Annotated[int, Field(ge=1, le=1 << 50)]
"""A size of at least 1 byte and at most 1 PiB."""

NonNegative = Annotated[int, Field(ge=0, le=(1 << 63) - 1)]
"""A whole number of at least 0."""

Seconds = Annotated[float, Field(gt=0, le=31_536_000)]
"""A time above 0 and up to a year."""

NonNegativeSeconds = Annotated[float, Field(ge=0, le=31_536_000)]
"""A time from 0 up to a year."""

Probability = Annotated[float, Field(ge=0, le=1)]
"""A share of all cases."""


# -- weights ----------------------------------------------------------------------------------------------------------

WEIGHT_FORMS: Final = 'a number, "lambda step: …", or the dotted path of a function of the step'


def _weight(value: Any) -> float | str:
    """A weight whose text can be a weight; dotted paths are resolved later, by ``check`` and by the daemon."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise problem(f"expected a weight, got {shown(value)}", WEIGHT_FORMS)
    if not isinstance(value, str):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not (math.isfinite(number) and number >= 0):
            raise problem(
                f"the weight {number:g} is not a finite number of at least 0", "0 keeps a source out of batches"
            )
        return value
    text = value.strip()
    if text.startswith("lambda"):
        try:
            compile_expression(text)
        except ExpressionError as error:
            raise problem(error.message, 'such as "lambda step: 0.9 - 0.8 * min(step / 200, 1.0)"') from error
    elif not is_dotted_path(text):
        quoted = "remove the quotes" if _is_number(text) else WEIGHT_FORMS
        raise problem(f"expected a weight, got {shown(value)}", quoted)
    return text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


WeightText = Annotated[
    float | str,
    PlainValidator(_weight, json_schema_input_type=float | str),
    Schema({"anyOf": [{"type": "number", "minimum": 0}, {"type": "string", "pattern": r"^\s*lambda\b|\."}]}),
]
"""A weight as written; ``orchestrator.core.weights.table.parse_weight`` makes a function of it."""


def list_of(what: str, example: str, *, least: int = 0) -> BeforeValidator:
    """A validator that refuses what is no list, or too short a one, with an example of the list that is expected."""

    def check(value: Any) -> Any:
        if value is not None and not isinstance(value, list | tuple):
            raise problem(f"expected a list, {what}; got {shown(value)}", f"write {example}")
        if value is not None and len(value) < least:
            raise problem("the list is empty", f"expected at least {least}: write {example}")
        return value

    return BeforeValidator(check)
