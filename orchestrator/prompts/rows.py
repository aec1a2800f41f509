"""From one row of a file to a prompt, the same for every format.

Invariants:

* A row is either a prompt or a :class:`BadRow` with a sentence that says what is wrong; nothing is guessed or mended.
* What leaves here can be written as JSON, so that a group never fails for its prompt when it is finished.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import orjson

from orchestrator.records import Message

__all__ = ["DEFAULT_INPUT_KEY", "BadRow", "Row", "RowKeys", "list_keys"]

DEFAULT_INPUT_KEY: Final = "prompt"
DEFAULT_LABEL_KEY: Final = "label"
DEFAULT_METADATA_KEY: Final = "metadata"

MAX_TOKEN_ID: Final = (1 << 31) - 1
"""Token ids are signed 32-bit numbers everywhere here."""

MAX_LISTED_KEYS: Final = 20
"""Keys that an error message lists; rows with thousands of keys exist."""


class BadRow(ValueError):
    """A row is not a prompt; the text says why, without the place, which the reader of the file knows."""


class Row(NamedTuple):
    """What a prompt takes from its row; ``content`` is ``None`` where the row gives ``tokens``."""

    content: str | list[Message] | None
    tokens: array[int] | None
    label: Any
    metadata: dict[str, Any]
    max_new_tokens: int | None = None


def list_keys(keys: list[str]) -> str:
    """Keys as the text of an error message, at most ``MAX_LISTED_KEYS`` of them."""
    more = f" and {len(keys) - MAX_LISTED_KEYS} more" if len(keys) > MAX_LISTED_KEYS else ""
    return (", ".join(repr(key) for key in keys[:MAX_LISTED_KEYS]) or "none") + more


@dataclass(frozen=True, slots=True)
class RowKeys:
    """Which keys of a row are looked at.

    ``label_key`` and ``metadata_key`` are ``None`` for ``label`` and ``metadata`` where a row has them; a key that is
    named has to be in every row. ``json_text`` lets metadata be a string of JSON, which is how files with a fixed
    schema carry it. ``max_new_tokens_key`` is ``None`` where rows do not bound their responses.
    """

    input_key: str = DEFAULT_INPUT_KEY
    label_key: str | None = None
    metadata_key: str | None = None
    json_text: bool = False
    max_new_tokens_key: str | None = None

    @property
    def required(self) -> list[str]:
        """Keys that every row must have."""
        keys = (self.input_key, self.label_key, self.metadata_key, self.max_new_tokens_key)
        return [key for key in keys if key is not None]

    @property
    def optional(self) -> list[str]:
        """Keys that are read where a row has them."""
        pairs = ((self.label_key, DEFAULT_LABEL_KEY), (self.metadata_key, DEFAULT_METADATA_KEY))
        return [default for key, default in pairs if key is None and default not in self.required]

    def check_keys(self, keys: Mapping[str, Any]) -> None:
        """Raise :class:`BadRow` unless every required key is there."""
        missing = [key for key in self.required if key not in keys]
        if missing:
            raise BadRow(f"no key {list_keys(missing)}; the row has {list_keys(list(keys))}")

    def parse(self, value: Any) -> Row:
        """Read one row.

        Raises:
            BadRow: it is not an object, lacks a key, or a value is of a type that a prompt cannot have.
        """
        if not isinstance(value, dict):
            raise BadRow(f"expected an object, got {_kind(value)}")
        self.check_keys(value)
        content, tokens = self._content(value[self.input_key])
        label = value.get(self.label_key or DEFAULT_LABEL_KEY)
        _check_json(label, self.label_key or DEFAULT_LABEL_KEY)
        return Row(content, tokens, label, self._metadata(value), self._max_new_tokens(value))

    def _content(self, value: Any) -> tuple[str | list[Message] | None, array[int] | None]:
        key = repr(self.input_key)
        if isinstance(value, str | list) and not value:
            raise BadRow(f"{key} is empty")
        if isinstance(value, str):
            return value, None
        if isinstance(value, list) and isinstance(value[0], dict):
            return [_message(item, f"{key}[{index}]") for index, item in enumerate(value)], None
        if isinstance(value, list) and type(value[0]) is int:
            for index, item in enumerate(value):
                if type(item) is not int or not 0 <= item <= MAX_TOKEN_ID:
                    raise BadRow(f"{key}[{index}] is not a token id (a whole number from 0 to {MAX_TOKEN_ID})")
            return None, array("i", value)
        kind = f"a list that starts with {_kind(value[0])}" if isinstance(value, list) else _kind(value)
        raise BadRow(f"{key} is {kind}; expected a string, a list of chat messages or a list of token ids")

    def _max_new_tokens(self, row: dict[str, Any]) -> int | None:
        if self.max_new_tokens_key is None:
            return None
        value = row[self.max_new_tokens_key]
        if type(value) is not int or value < 1:
            raise BadRow(f"{self.max_new_tokens_key!r} is {value!r:.40}; expected a whole number of at least 1")
        return value

    def _metadata(self, row: dict[str, Any]) -> dict[str, Any]:
        key = self.metadata_key or DEFAULT_METADATA_KEY
        value = row.get(key)
        if value is None:
            return {}
        if self.json_text and isinstance(value, str):
            try:
                value = orjson.loads(value)
            except orjson.JSONDecodeError as error:
                raise BadRow(f"{key!r} is a string that is not JSON: {error}") from None
        if not isinstance(value, dict):
            raise BadRow(f"{key!r} is {_kind(value)}; expected an object")
        _check_json(value, key)
        return value


def _message(value: Any, place: str) -> Message:
    """One chat message, without the nulls that a fixed schema puts in for fields which a message does not have."""
    if not isinstance(value, dict):
        raise BadRow(f"{place} is {_kind(value)}; expected a chat message, which is an object")
    role = value.get("role")
    if not isinstance(role, str) or not role:
        raise BadRow(f"{place} needs a 'role' that is a string")
    if "content" not in value:
        raise BadRow(f"{place} has no 'content'; its keys are {list_keys(list(value))}")
    content = value["content"]
    if content is not None and not isinstance(content, str | list):
        raise BadRow(f"{place}['content'] is {_kind(content)}; expected a string, a list of parts or null")
    message = {key: item for key, item in value.items() if item is not None or key == "content"}
    _check_json(message, place)
    return message


def _check_json(value: Any, place: str) -> None:
    """A file may hold what JSON cannot say: bytes, decimals."""
    if value is None or isinstance(value, str | bool | int | float):
        return
    try:
        orjson.dumps(value)
    except orjson.JSONEncodeError as error:
        raise BadRow(f"{place!r} cannot be written as JSON: {error}") from None


def _kind(value: Any) -> str:
    """What a value is, in the words of JSON."""
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "a string"
        case list():
            return "a list"
        case dict():
            return "an object"
        case _:
            return f"a value of type {type(value).__name__}"
