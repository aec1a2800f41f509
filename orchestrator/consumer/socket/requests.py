"""From the bytes of a request's header to a request.

Invariants:

* The shape of the JSON (its depth, the number of its values) is bounded before anything is made of it: a megabyte of
  ``[[],[],…`` would become thirty megabytes of empty lists.
* Nothing here knows what a method means; see ``methods`` for the parameters.
"""

from __future__ import annotations

import re
from typing import Any, Final, NamedTuple

from orchestrator.errors import FrameError
from orchestrator.frames import parse_header

__all__ = ["MAX_REQUEST_DEPTH", "MAX_REQUEST_VALUES", "Request", "parse_request"]

MAX_REQUEST_DEPTH: Final = 32
"""Objects and lists within each other; an engine with values for its chat template has six."""

MAX_REQUEST_VALUES: Final = 4096
"""Keys and values of a request; the longest one of ours, an engine to be added, has fewer than a hundred."""

_STRING: Final = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
"""Possessive, and content without a closing quote: every byte is looked at once, whatever was sent."""

_BRACKET: Final = re.compile(rb"[\[\]{}]")


class Request(NamedTuple):
    """One request as it came."""

    id: int
    method: str
    params: dict[str, Any]


def parse_request(header: bytes) -> Request:
    """The request of a frame's header.

    Raises:
        FrameError: too deep, too many values, no JSON object, or not a request.
    """
    _check_shape(header)
    found = parse_header(header)
    request_id, method, params = found.get("id"), found.get("method"), found.get("params", {})
    if type(request_id) is not int or not isinstance(method, str) or not isinstance(params, dict):
        raise FrameError('a request is {"id": <integer>, "method": "<name>", "params": {…}}')
    return Request(request_id, method, params)


def _check_shape(header: bytes) -> None:
    """Raise ``FrameError`` where JSON of this text would be too deep or of too many values.

    Counting signs, those inside of strings with them, can only overestimate; few texts need a closer look.
    """
    if header.count(b"[") + header.count(b"{") <= MAX_REQUEST_DEPTH and _values(header) <= MAX_REQUEST_VALUES:
        return
    bare = _STRING.sub(b"", header)
    if (values := _values(bare)) > MAX_REQUEST_VALUES:
        raise FrameError(f"a header of about {values} keys and values; at most {MAX_REQUEST_VALUES} are allowed")
    depth = 0
    for bracket in _BRACKET.findall(bare):
        depth += 1 if bracket in b"[{" else -1
        if depth > MAX_REQUEST_DEPTH:
            raise FrameError(f"a header nested more than {MAX_REQUEST_DEPTH} levels deep")


def _values(text: bytes) -> int:
    return text.count(b",") + text.count(b":") + text.count(b"[") + text.count(b"{")
