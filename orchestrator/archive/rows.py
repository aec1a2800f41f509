"""From a group's frame to what the archive says of it: one object a group, the same in both formats.

Invariants:

* The object is made of the frame and of its batch alone: writing a batch again gives the same content.
* Parquet has the token ids, log-probabilities and loss masks as columns; JSON lines leave them out, because as text
  they take ten times the space of all the rest.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from orchestrator.core.ledger.unarchived import TrainedBatch
from orchestrator.frames import GroupFrame
from orchestrator.records import NO_VERSION

__all__ = ["COLUMNS", "group_object"]

COLUMNS: Final = ("response_tokens", "logprobs", "loss_mask")
"""What a sample has of each response token."""


def group_object(batch: TrainedBatch, frame: GroupFrame, *, with_tokens: bool) -> dict[str, Any]:
    """What is archived of one group.

    Args:
        batch: that it was trained on in.
        frame: its frame.
        with_tokens: with numpy arrays of token ids, log-probabilities and loss masks.
    """
    header = frame.header
    prompt = frame.json("prompt")
    row: dict[str, Any] = {
        "step": batch.key.step,
        "history": batch.key.history,
        "policy_version": batch.policy_version,
        "source": header["source"],
        "weight": batch.weights.get(header["source"]),
        "group_index": header["group_index"],
        "prompt_index": header["prompt_index"],
        "epoch": header["epoch"],
        "prompt": prompt,
        "label": frame.json("label"),
        "metadata": frame.json("metadata") or {},
        "sampling": header.get("sampling") or {},
        "samples": _samples(frame, with_tokens=with_tokens),
    }
    if with_tokens:
        row["prompt_tokens"] = frame.column("prompt_tokens")
    elif prompt is None:
        row["prompt_tokens"] = frame.column("prompt_tokens").tolist()
    return row


def _samples(frame: GroupFrame, *, with_tokens: bool) -> list[dict[str, Any]]:
    offsets = frame.column("response_offsets").tolist()
    text = frame.column("text").tobytes() if "text" in frame else b""
    ends = frame.column("text_offsets").tolist() if "text" in frame else [0] * len(offsets)
    columns = {name: frame.column(name) if name in frame else None for name in COLUMNS} if with_tokens else {}
    return [
        {
            "index": sample["index"],
            "status": sample["status"],
            "reward": sample["reward"],
            "finish_reason": sample.get("finish_reason"),
            "tokens": offsets[i + 1] - offsets[i],
            "versions": sample["versions"],
            "oldest_version": min((v for v, _ in sample["versions"] if v != NO_VERSION), default=None),
            "response": text[ends[i] : ends[i + 1]].decode("utf-8", "replace"),
            "metadata": sample.get("metadata") or {},
            **{name: _piece(column, offsets[i], offsets[i + 1]) for name, column in columns.items()},
        }
        for i, sample in enumerate(frame.header["samples"])
    ]


def _piece(column: np.ndarray[Any, Any] | None, begin: int, end: int) -> np.ndarray[Any, Any] | None:
    return None if column is None else column[begin:end]
