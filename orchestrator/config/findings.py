"""What is wrong in a config, before it is known on which line."""

from __future__ import annotations

from typing import NamedTuple

from .text import Location

__all__ = ["Finding"]


class Finding(NamedTuple):
    """One thing wrong: where, what, and what would be right."""

    location: Location
    message: str
    hint: str = ""
