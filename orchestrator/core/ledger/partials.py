"""Partial rollouts as frames: what a sample gained in one piece of its generation.

Invariants:

* A partial frame is a *delta*: it holds the tokens from ``start`` on, so that a long generation is written once in all
  and not once a piece. ``start`` 0 begins the sample anew and forgets what was before.
* Merging the deltas of a sample in order gives the sample back: tokens, log-probabilities, versions, status, reward.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import Any

from orchestrator.errors import FrameError
from orchestrator.frames import MAX_INLINE_JSON_BYTES, GroupFrame, encode_frame
from orchestrator.records import Sample, SampleStatus, Versions

__all__ = ["encode_partial", "merge_partial", "restore_samples"]


def _versions_from(versions: Versions, start: int) -> Versions:
    """The run-length versions of the tokens from ``start`` on."""
    tail: Versions = []
    for version, count in versions:
        kept = min(count, max(0, count - start))
        start = max(0, start - count)
        if kept or not count:  # of text alone, 0 tokens are of a version
            tail.append([version, kept])
    return tail


def encode_partial(*, source: str, group_index: int, slot: int, sample: Sample, start: int) -> bytes:
    """The state of the sample in position ``slot`` of its group, with the tokens from ``start`` on."""
    tokens = sample.tokens[start:]
    columns: dict[str, Any] = {"response_tokens": ("I32", 0, 4 * len(tokens))}
    parts: list[Any] = [tokens, bytes(-4 * len(tokens) % 8)]
    size = sum(map(_nbytes, parts))
    if sample.logprobs is not None:
        logprobs = sample.logprobs[start:]
        columns["logprobs"] = ("F32", size, size + 4 * len(logprobs))
        parts += [logprobs, bytes(-4 * len(logprobs) % 8)]
        size = sum(map(_nbytes, parts))
    text = sample.text.encode("utf-8", "replace")
    if len(text) > MAX_INLINE_JSON_BYTES:  # a header could not hold that of a long context
        columns["text"] = ("U8", size, size + len(text))
        parts += [text, bytes(-len(text) % 8)]
        size = sum(map(_nbytes, parts))
    header = {
        "source": source,
        "group_index": group_index,
        "slot": slot,
        "start": start,
        "index": sample.index,
        "status": sample.status.value,
        "finish_reason": sample.finish_reason,
        "reward": sample.reward,
        "versions": _versions_from(sample.versions, start),
        "text": None if "text" in columns else sample.text,
        "metadata": sample.metadata,
        "columns": columns,
    }
    return b"".join((encode_frame(header, size), *parts))


def _nbytes(part: bytes | array[Any]) -> int:
    return len(part) * (part.itemsize if isinstance(part, array) else 1)


def merge_partial(sample: Sample, frame: GroupFrame) -> None:
    """Apply one delta to the sample that the deltas before it gave.

    Raises:
        FrameError: the delta does not begin where the sample ends.
    """
    header = frame.header
    start = header["start"]
    if start == 0:
        sample.clear()
    if start != len(sample.tokens):
        raise FrameError(
            f"group {header['group_index']}: a partial rollout continues at token {start},"
            f" but {len(sample.tokens)} are known"
        )
    tokens: list[int] = frame.column("response_tokens").tolist()
    logprobs: list[float] | None = frame.column("logprobs").tolist() if "logprobs" in frame else None
    at = 0
    for version, count in header["versions"]:
        if count:
            sample.extend(tokens[at : at + count], None if logprobs is None else logprobs[at : at + count], version)
        else:
            sample.versions.append([version, 0])
        at += count
    if logprobs is None:
        sample.logprobs = None
    sample.status = SampleStatus(header["status"])
    sample.finish_reason = header["finish_reason"]
    sample.reward = header["reward"]
    sample.text = frame.column("text").tobytes().decode() if "text" in frame else header["text"]
    sample.metadata = header["metadata"]


def restore_samples(first_sample: int, n: int, frames: Iterable[bytes | memoryview]) -> list[Sample]:
    """The ``n`` samples of a group as its partial frames, in the order in which they were written, left them."""
    samples = [Sample(index=first_sample + slot) for slot in range(n)]
    for raw in frames:
        frame = GroupFrame(raw)
        merge_partial(samples[frame.header["slot"]], frame)
    return samples
