"""The shape of a request is bounded before anything is made of it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.consumer.socket.requests import MAX_REQUEST_DEPTH, MAX_REQUEST_VALUES, Request, parse_request
from orchestrator.errors import FrameError
from orchestrator.frames import MAX_HEADER_BYTES

TEXT = st.text(st.characters(codec="utf-8"), max_size=20) | st.text('[]{},:"\\', max_size=80)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | TEXT,
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(TEXT, inner, max_size=8),
    max_leaves=20,
)


def text_of(params: Any) -> bytes:
    return json.dumps({"id": 5, "method": "m", "params": params}).encode()


def nested(levels: int, opening: str, closing: str) -> bytes:
    """A request that has that many objects and lists within each other."""
    return b'{"id":1,"method":"m","x":%s1%s}' % ((opening * (levels - 1)).encode(), (closing * (levels - 1)).encode())


@settings(max_examples=60)
@given(st.dictionaries(TEXT, VALUES, max_size=8))
def test_what_is_within_the_limits_comes_out_as_it_went_in(params: dict[str, Any]) -> None:
    """Strings full of brackets and quotes count for what they are."""
    assert parse_request(text_of(params)) == Request(5, "m", params)


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_depth_is_bounded(opening: str, closing: str) -> None:
    assert parse_request(nested(MAX_REQUEST_DEPTH, opening, closing)).id == 1
    with pytest.raises(FrameError, match="levels deep"):
        parse_request(nested(MAX_REQUEST_DEPTH + 1, opening, closing))
    with pytest.raises(FrameError, match=r"within each other|keys and values"):
        parse_request(nested(100_000, opening, closing))


def test_many_brackets_that_are_not_deep_are_fine() -> None:
    lists: list[Any] = [[] for _ in range(MAX_REQUEST_VALUES // 4)]
    assert parse_request(text_of({"a": lists})).params == {"a": lists}
    brackets = "[" * 500_000
    assert parse_request(text_of({"a": brackets})).params == {"a": brackets}


@pytest.mark.parametrize(
    "params",
    [
        {"a": [0] * (MAX_REQUEST_VALUES + 1)},
        {"a": [[]] * (MAX_REQUEST_VALUES + 1)},
        {str(i): 0 for i in range(MAX_REQUEST_VALUES)},
    ],
)
def test_values_are_bounded(params: dict[str, Any]) -> None:
    with pytest.raises(FrameError, match="keys and values"):
        parse_request(text_of(params))


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 40 + b'"' + b'\\"' * (MAX_HEADER_BYTES // 2 - 50),
        b"[" * 40 + b'"' + b"x" * (MAX_HEADER_BYTES - 50),
        b'{"a":"' + b"\\" * (MAX_HEADER_BYTES - 6),
        b'"' * MAX_HEADER_BYTES,
        b"[" * MAX_HEADER_BYTES,
        b"[]," * (MAX_HEADER_BYTES // 3),
        b'[["' * (MAX_HEADER_BYTES // 3),
        b"{}",
        b"[]",
        b"null",
        b"\xff",
        b"",
        b'{"id":1.0,"method":"m"}',
        b'{"id":true,"method":"m"}',
        b'{"id":18446744073709551616,"method":"m"}',
        b'{"id":1,"method":null}',
        b'{"id":1,"method":"m","params":null}',
    ],
    ids=lambda text: text[:12],
)
def test_what_is_no_request_is_a_frame_error_and_is_looked_at_once(text: bytes) -> None:
    """The largest headers of the worst kinds: what is not linear in their length meets the deadline of the test."""
    with pytest.raises(FrameError):
        parse_request(text)


@given(st.binary(max_size=300))
def test_any_bytes_are_a_request_or_a_frame_error(data: bytes) -> None:
    with pytest.raises(FrameError):
        parse_request(data)
