"""Sequences of different lengths as rectangles: from columns, one value a sample or a token, to rows of equal length.

Invariants:

* Every array returned is fresh memory: writable, and independent of the batch's buffers.
* Nothing is cut off in silence: ``is_cut`` names the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .groups import Array

__all__ = ["Columns", "pad"]


@dataclass(frozen=True, slots=True)
class Columns:
    """What is padded: S samples, T response tokens in all, everything in the order of the samples.

    ``prompts``: for each group its prompt's tokens and how many samples it has. ``prompt_lengths``,
    ``response_lengths``, ``rewards``, ``group_ids``: [S]. ``response_tokens``, ``loss_mask``, ``logprobs`` (``None``
    where not every group has them): [T].
    """

    prompts: Sequence[tuple[Array, int]]
    prompt_lengths: Array
    response_lengths: Array
    rewards: Array
    group_ids: Array
    response_tokens: Array
    loss_mask: Array
    logprobs: Array | None


def pad(columns: Columns, pad_token_id: int, max_len: int | None, side: str) -> dict[str, Array]:
    """See :meth:`orchestrator.client.Batch.padded`."""
    prompts, responses = columns.prompt_lengths, columns.response_lengths
    wanted = prompts + responses
    longest = int(wanted.max(initial=0))
    if max_len is not None and max_len < 1:
        raise ValueError(f"max_len is {max_len}, but must be at least 1")
    if side not in ("right", "left"):
        raise ValueError(f"side is {side!r}, but must be right or left")
    mask = columns.loss_mask
    if len(mask) != int(responses.sum()):
        raise ValueError(f"loss_mask has {len(mask)} entries for {int(responses.sum())} response tokens")
    width = longest if max_len is None else min(longest, max_len)

    lengths = np.minimum(wanted, width)
    starts = width - lengths if side == "left" else np.zeros_like(lengths)
    column = np.arange(width) - starts[:, None]  # position in the sequence; outside [0, length) is filling
    attention = (column >= 0) & (column < lengths[:, None])
    response = attention & (column >= prompts[:, None])
    # Row-major order of `response` is the order of the flat arrays, without the tokens that were cut off.
    kept = _kept(responses, lengths - prompts)

    arrays = {
        "tokens": _tokens(columns, attention, response, kept, pad_token_id),
        "attention_mask": attention,
        "response_mask": response,
        "loss_mask": np.zeros_like(response),
        "is_cut": wanted > width,
        "rewards": columns.rewards,
        "group_ids": columns.group_ids,
        "prompt_lengths": prompts,
        "response_lengths": responses,
    }
    arrays["loss_mask"][response] = mask[kept] != 0
    if (flat := columns.logprobs) is not None:
        arrays["logprobs"] = np.zeros(response.shape, np.float32)
        arrays["logprobs"][response] = flat[kept]
    return arrays


def _kept(lengths: Array, kept: Array) -> Array:
    """[T] bool: of runs of ``lengths``, the first ``kept`` of each; none where that is negative."""
    starts = np.cumsum(lengths) - lengths
    position = np.arange(int(lengths.sum())) - np.repeat(starts, lengths)
    mask: Array = position < np.repeat(kept, lengths)
    return mask


def _tokens(columns: Columns, attention: Array, response: Array, kept: Array, pad_token_id: int) -> Array:
    tokens = np.full(response.shape, pad_token_id, np.int32)
    tokens[response] = columns.response_tokens[kept]
    row = 0
    for prompt_tokens, n in columns.prompts:
        rows = slice(row, row + n)
        row += n
        shown = min(len(prompt_tokens), response.shape[1])
        prompt = attention[rows] & ~response[rows]
        tokens[rows][prompt] = np.tile(prompt_tokens[:shown], n)
    return tokens
