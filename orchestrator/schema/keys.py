"""Keys of servers, which stand in environment variables.

Invariants:

* White space around a key is no part of it: files and secrets end with a newline.
* A key that cannot stand in a header is a problem, named by its variable. A key is never shown.
"""

from __future__ import annotations

import os
from typing import NamedTuple

__all__ = ["ServerKey", "key_problem", "read_key"]


class ServerKey(NamedTuple):
    """``value`` is the key, or ``problem`` says why there is none; both are ``None`` where none is needed."""

    value: str | None = None
    problem: str | None = None


def read_key(variable: str | None) -> ServerKey:
    """The key that the environment variable holds; ``variable`` is ``None`` where a server needs none."""
    if variable is None:
        return ServerKey()
    key = os.environ.get(variable, "").strip()
    if not key:
        return ServerKey(problem=f"the environment variable {variable} has no key")
    if (wrong := key_problem(variable)) is not None:
        return ServerKey(problem=wrong)
    return ServerKey(key)


def key_problem(variable: str) -> str | None:
    """Why what the variable holds cannot be a key; ``None``: it can, or the variable is not set here."""
    key = os.environ.get(variable, "").strip()
    control = sum(ord(character) < 0x20 or ord(character) == 0x7F for character in key)
    foreign = sum(ord(character) > 0xFF for character in key)
    if not control and not foreign:
        return None
    which = f"{control} control characters" if control else f"{foreign} characters that are not Latin-1"
    return f"the key in the environment variable {variable} has {which}, which no header can carry"
