"""Whether a group frame adds up, before anybody computes with it.

Invariants:

* What does not add up (offsets, lengths, versions, types) is a ``FrameError``, never a wrong number.
* Header keys and columns that are not known here are ignored.
"""

from __future__ import annotations

import math
from typing import Any, Final

from orchestrator.errors import FrameError
from orchestrator.frames import GroupFrame
from orchestrator.records import SampleStatus

__all__ = ["check_group"]

_DTYPES: Final[dict[str, str]] = {
    "prompt_tokens": "I32",
    "response_offsets": "I64",
    "response_tokens": "I32",
    "logprobs": "F32",
    "loss_mask": "U8",
    "text_offsets": "I64",
    "text": "U8",
}
_STATUSES: Final = frozenset(SampleStatus)
_NUMBERS: Final = (int, float)
_OBJECT_OR_NULL: Final = (dict, type(None))
"""Types as JSON is read; these checks are made for every sample of every batch, and most of a small batch's cost."""

_ITEM_BYTES: Final = {"U8": 1, "I32": 4, "F32": 4, "I64": 8}


def check_group(frame: GroupFrame) -> None:
    """Look at everything in the frame.

    Raises:
        FrameError: something does not add up; the message names the group.
    """
    header = frame.header
    if not isinstance(header.get("source"), str) or type(header.get("group_index")) is not int:
        raise FrameError("a group has a string `source` and an integer `group_index`")
    samples = header.get("samples")
    if not isinstance(samples, list) or header.get("n", len(samples)) != len(samples):
        raise FrameError(f"group {header['group_index']}: `samples` is a list of `n` objects")
    try:
        _check_columns(frame, samples)
    except FrameError as error:
        raise FrameError(f"group {header['group_index']}: {error}") from None


def _check_columns(frame: GroupFrame, samples: list[Any]) -> None:
    columns = frame.header["columns"]
    for name, dtype in _DTYPES.items():
        if name in columns and columns[name][0] != dtype:
            raise FrameError(f"column {name} is {columns[name][0]}, {dtype} is expected")
    for name in ("prompt_tokens", "response_offsets", "response_tokens"):
        if name not in columns:
            raise FrameError(f"column {name} is missing")
    total = _length(frame, "response_tokens")
    offsets = _check_offsets(frame, "response_offsets", len(samples), total)
    for name in ("logprobs", "loss_mask"):
        if name in columns and _length(frame, name) != total:
            raise FrameError(f"column {name} has {_length(frame, name)} entries, there are {total} response tokens")
    if ("text" in columns) != ("text_offsets" in columns):
        raise FrameError("columns text and text_offsets come together")
    if "text" in columns:
        _check_offsets(frame, "text_offsets", len(samples), _length(frame, "text"))
    for i, sample in enumerate(samples):
        _check_sample(i, sample, offsets[i + 1] - offsets[i])


def _length(frame: GroupFrame, name: str) -> int:
    dtype, begin, end = frame.header["columns"][name]
    length: int = (end - begin) // _ITEM_BYTES[dtype]
    return length


def _check_offsets(frame: GroupFrame, name: str, n: int, total: int) -> list[int]:
    offsets: list[int] = frame.column(name).tolist()
    if len(offsets) != n + 1 or offsets[0] != 0 or offsets[-1] != total or offsets != sorted(offsets):
        raise FrameError(f"column {name} does not rise from 0 to {total} in {n + 1} entries")
    return offsets


def _check_sample(i: int, sample: Any, tokens: int) -> None:
    is_object = isinstance(sample, dict) and type(sample.get("index")) is int
    if not is_object or type(sample.get("status")) is not str or sample["status"] not in _STATUSES:
        raise FrameError(f"sample {i} is an object with an integer `index` and a known `status`")
    reward: Any = sample.get("reward")
    if type(reward) not in _NUMBERS or not math.isfinite(reward):
        raise FrameError(f"sample {i}: its reward is {reward!r}, a finite number is expected")
    if type(sample.get("metadata")) not in _OBJECT_OR_NULL:
        raise FrameError(f"sample {i}: `metadata` is an object")
    versions, counted = sample.get("versions"), 0
    if not isinstance(versions, list):
        raise FrameError(f"sample {i}: `versions` is a list of [version, number of tokens]")
    for run in versions:
        if not _is_run(run):
            raise FrameError(f"sample {i}: `versions` is a list of [version, number of tokens]")
        counted += run[1]
    if counted != tokens:
        raise FrameError(f"sample {i}: the counts of its versions do not add up to its {tokens} tokens")


def _is_run(run: Any) -> bool:
    return (
        isinstance(run, list)
        and len(run) == 2
        and type(run[0]) is int
        and type(run[1]) is int
        and -1 <= run[0] < 1 << 53
        and run[1] >= 0
    )
