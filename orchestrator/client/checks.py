"""Whether a group frame adds up, before anybody computes with it.

Invariants:

* What does not add up (offsets, lengths, versions, types) is a ``FrameError``, never a wrong number. Columns are looked
  at first; what is said of the samples when somebody asks for it.
* Header keys and columns that are not known here are ignored.
"""

from __future__ import annotations

import math
from operator import itemgetter, sub
from typing import Any, Final

from orchestrator.errors import FrameError
from orchestrator.frames import GroupFrame
from orchestrator.records import NO_VERSION, SampleStatus

__all__ = ["check_columns", "check_samples", "rewards_of"]

_DTYPES: Final[dict[str, str]] = {
    "prompt_tokens": "I32",
    "response_offsets": "I64",
    "response_tokens": "I32",
    "logprobs": "F32",
    "loss_mask": "U8",
    "text_offsets": "I64",
    "text": "U8",
}
_STATUSES: Final = frozenset(status.value for status in SampleStatus)
_OBJECT_OR_NULL: Final = (dict, type(None))
_FACTS: Final = itemgetter("index", "status", "reward", "versions", "metadata")
_OF_INTEGERS: Final = {int}
_OF_OBJECTS: Final = {dict}
_REAL: Final = {int, float}

VERSIONS_END: Final = 1 << 53
"""Policy versions are whole numbers that a JSON reader of any language holds exactly."""


def check_columns(frame: GroupFrame) -> list[int]:
    """Look at the frame's columns, and whether it has samples.

    Returns:
        [n+1]: where each sample's tokens begin and end.

    Raises:
        FrameError: something does not add up; the message names the group.
    """
    header = frame.header
    if type(header.get("source")) is not str or type(header.get("group_index")) is not int:
        raise FrameError("a group needs a string `source` and an integer `group_index`")
    samples = header.get("samples")
    if type(samples) is not list or header.get("n", len(samples)) != len(samples):
        raise FrameError(f"group {header['group_index']}: `samples` must be a list of `n` objects")
    try:
        return _check_columns(frame, len(samples))
    except FrameError as error:
        raise FrameError(f"group {header['group_index']}: {error}") from None


def rewards_of(frame: GroupFrame) -> list[float]:
    """[n]: the rewards of a frame whose columns have been looked at; raises ``FrameError``."""
    samples = frame.header["samples"]
    try:
        rewards: list[float] = [sample["reward"] for sample in samples]
        if {*map(type, rewards)} <= _REAL and all(map(math.isfinite, rewards)):
            return rewards
    except (KeyError, TypeError, OverflowError):
        pass
    for i, sample in enumerate(samples):
        _check_reward(f"group {frame.header['group_index']}: sample {i}", sample)
    raise FrameError(f"group {frame.header['group_index']}: its rewards cannot be read")


def check_samples(frame: GroupFrame, offsets: list[int]) -> None:
    """Look at what a frame says of its samples; raises as :func:`check_columns`, which gave the offsets."""
    samples = frame.header["samples"]
    if _are_plain(samples, offsets):
        return
    try:
        for i, sample in enumerate(samples):
            _check_sample(i, sample, offsets[i + 1] - offsets[i])
    except FrameError as error:
        raise FrameError(f"group {frame.header['group_index']}: {error}") from None


def _check_columns(frame: GroupFrame, n: int) -> list[int]:
    columns = frame.header["columns"]
    for name, (dtype, _, _) in columns.items():
        if dtype != _DTYPES.get(name, dtype):
            raise FrameError(f"column {name} is {dtype}; expected {_DTYPES[name]}")
    for name in ("prompt_tokens", "response_offsets", "response_tokens"):
        if name not in columns:
            raise FrameError(f"column {name} is missing")
    total = frame.length("response_tokens")
    offsets = _check_offsets(frame, "response_offsets", n, total)
    for name in ("logprobs", "loss_mask"):
        if name in columns and frame.length(name) != total:
            raise FrameError(f"column {name} has {frame.length(name)} entries for {total} response tokens")
    if ("text" in columns) != ("text_offsets" in columns):
        raise FrameError("columns text and text_offsets must come together")
    if "text" in columns:
        _check_offsets(frame, "text_offsets", n, frame.length("text"))
    return offsets


def _check_offsets(frame: GroupFrame, name: str, n: int, total: int) -> list[int]:
    offsets = frame.integers(name)
    if len(offsets) != n + 1 or offsets[0] != 0 or offsets[-1] != total or offsets != sorted(offsets):
        raise FrameError(f"column {name} must rise from 0 to {total} in {n + 1} entries")
    return offsets


def _are_plain(samples: list[Any], offsets: list[int]) -> bool:
    """Whether all samples are as they mostly are, each of one policy version. Whoever is not is looked at closely.

    By columns and not sample by sample: these checks are most of what a small batch costs.
    """
    try:  # what is unpacked may be a text or an object where a list should be, and then holds texts and no integers
        indices, statuses, rewards, versions, metadata = zip(*map(_FACTS, samples), strict=True)
        runs = [(version, count) for ((version, count),) in versions]
        of_versions, counts = zip(*runs, strict=True)
        return (
            {*map(type, indices), *map(type, of_versions), *map(type, counts)} == _OF_INTEGERS
            and _STATUSES.issuperset(statuses)
            and {*map(type, rewards)} <= _REAL
            and all(map(math.isfinite, rewards))
            and {*map(type, metadata)} == _OF_OBJECTS
            and min(of_versions) >= NO_VERSION
            and max(of_versions) < VERSIONS_END
            and list(map(sub, offsets[1:], offsets)) == list(counts)
        )
    except (KeyError, TypeError, ValueError, OverflowError):
        return False


def _check_sample(i: int, sample: Any, tokens: int) -> None:
    is_object = isinstance(sample, dict) and type(sample.get("index")) is int
    if not is_object or type(sample.get("status")) is not str or sample["status"] not in _STATUSES:
        raise FrameError(f"sample {i} must be an object with an integer `index` and a known `status`")
    _check_reward(f"sample {i}", sample)
    if type(sample.get("metadata")) not in _OBJECT_OR_NULL:
        raise FrameError(f"sample {i}: `metadata` must be an object")
    versions, counted = sample.get("versions"), 0
    if not isinstance(versions, list):
        raise FrameError(f"sample {i}: `versions` must be a list of [version, number of tokens]")
    for run in versions:
        if not _is_run(run):
            raise FrameError(f"sample {i}: `versions` must be a list of [version, number of tokens]")
        counted += run[1]
    if counted != tokens:
        raise FrameError(f"sample {i}: the token counts in `versions` do not add up to its {tokens} tokens")


def _check_reward(what: str, sample: Any) -> None:
    reward: Any = sample.get("reward") if isinstance(sample, dict) else None
    try:
        is_number = type(reward) in _REAL and math.isfinite(reward)
    except OverflowError:
        is_number = False
    if not is_number:
        raise FrameError(f"{what}: its reward is {reward!r:.100}; expected a finite number")


def _is_run(run: Any) -> bool:
    return (
        isinstance(run, list)
        and len(run) == 2
        and type(run[0]) is int
        and type(run[1]) is int
        and NO_VERSION <= run[0] < VERSIONS_END
        and run[1] >= 0
    )
