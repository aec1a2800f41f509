"""The vocabulary of the data: prompts, samples, groups.

Invariants:

* Standard library only, so that the client and slime's process can import it.
* The policy versions of a sample are run-length pairs ``[version, number of tokens]`` whose counts add up to the
  number of its tokens, always; adjacent pairs have different versions.
* ``logprobs`` is either absent for the whole sample or as long as ``tokens``.
* Tokens that no policy produced (what a tool or a user said between two turns) have the version ``NO_VERSION``, the
  log-probability 0 and the loss mask 0. While a sample grows its loss mask follows from its versions and is not kept.
* Tokens are held as C arrays (4 bytes each), not as lists: thousands of generations are in flight at a time.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

__all__ = ["NO_VERSION", "Group", "Message", "Prompt", "Sample", "SampleStatus", "Versions"]

Message = dict[str, Any]
"""One chat message: ``{"role": …, "content": …}``."""

Versions = list[list[int]]
"""Run-length policy versions: ``[[version, number of tokens], …]`` in token order."""

NO_VERSION = -1
"""The version of tokens that no policy produced (tool and user turns); staleness ignores it."""

MIN_PACKED: Final = 64
"""Items from which on ``struct`` turns a list into C numbers sooner than an array does: in half the time at 1,024."""


class SampleStatus(StrEnum):
    """Where a sample stands; the values are slime's five."""

    PENDING = "pending"
    COMPLETED = "completed"
    TRUNCATED = "truncated"
    ABORTED = "aborted"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Prompt:
    """One task of a source.

    ``prompt_index`` is the row in the source's file, from 0, counting prompts only. ``content`` is text, a list of
    chat messages, or ``None`` where the file gives ``tokens`` (token ids) alone. ``max_new_tokens`` bounds responses to
    this prompt; ``None``: as all of its source.
    """

    source: str
    prompt_index: int
    epoch: int
    content: str | list[Message] | None
    label: Any = None
    metadata: dict[str, Any] = field(default_factory=dict)
    tokens: Sequence[int] | None = None
    max_new_tokens: int | None = None


@dataclass(slots=True)
class Sample:
    """One response to one prompt; it grows while it is generated.

    ``tokens`` [T] int32 and ``logprobs`` [T] float32 hold every sampled token, end-of-sequence included, and between
    them the tokens of :meth:`append_context`. ``loss_mask`` is T bytes of 0 or 1, or ``None``: 1 for each token that a
    policy produced (:meth:`mask`). ``finish_reason`` says how the newest turn ended; with the status ``pending`` the
    sample is not at its end all the same: its text is still asked for, or another turn follows. ``reward`` is ``None``
    until it is scored.
    """

    index: int
    tokens: array[int] = field(default_factory=lambda: array("i"))
    logprobs: array[float] | None = field(default_factory=lambda: array("f"))
    versions: Versions = field(default_factory=list)
    text: str = ""
    status: SampleStatus = SampleStatus.PENDING
    finish_reason: str | None = None
    reward: float | None = None
    loss_mask: bytes | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    def extend(self, tokens: Sequence[int], logprobs: Sequence[float] | None, version: int) -> None:
        """Append tokens that arrived under one policy version.

        Raises:
            ValueError: if ``logprobs`` is of another length than ``tokens``.
        """
        count = len(tokens)
        if not count:
            return
        if logprobs is None:
            self.logprobs = None
        elif self.logprobs is not None:
            if len(logprobs) != count:
                raise ValueError(f"got {count} tokens but {len(logprobs)} log-probabilities")
            _append(self.logprobs, logprobs)
        _append(self.tokens, tokens)
        if self.versions and self.versions[-1][0] == version:
            self.versions[-1][1] += count
        else:
            self.versions.append([version, count])

    def append_context(self, tokens: Sequence[int]) -> None:
        """Append tokens that nobody sampled, such as the answer of a tool; the next turn goes on behind them.

        Raises:
            ValueError: without a token, where one turn ends and the next begins could not be told after a restart.
        """
        if not tokens:
            raise ValueError("the tokens between two turns must not be empty")
        self.extend(tokens, None if self.logprobs is None else [0.0] * len(tokens), NO_VERSION)
        self.finish_reason = None

    def mask(self) -> bytes:
        """The loss mask ``[T]``: ``loss_mask`` where it is set, else 1 for each token that a policy produced."""
        if self.loss_mask is not None:
            return self.loss_mask
        if NO_VERSION not in [version for version, _ in self.versions]:
            return b"\x01" * len(self.tokens)
        return b"".join([(b"\x00" if version == NO_VERSION else b"\x01") * count for version, count in self.versions])

    def end(self, reason: str, text: str) -> None:
        """It is finished: ``stop`` or ``length``, with this text."""
        self.text = text
        self.finish_reason = reason
        self.status = SampleStatus.TRUNCATED if reason == "length" else SampleStatus.COMPLETED

    def cut(self, length: int) -> None:
        """Forget the tokens from ``length`` on; with 0 everything, see :meth:`clear`.

        ``tokens`` is another array afterwards, so that whoever stored the sample up to here can tell.
        """
        if not length:
            self.clear()
            return
        self.tokens = self.tokens[:length]
        self.logprobs = None if self.logprobs is None else self.logprobs[:length]
        kept: Versions = []
        for version, count in self.versions:
            if length <= 0:
                break
            kept.append([version, min(count, length)])
            length -= count
        self.versions = kept
        self.finish_reason = None

    def clear(self) -> None:
        """Forget what was generated, to begin again from the prompt."""
        self.tokens = array("i")
        self.logprobs = array("f")
        self.versions = []
        self.text = ""
        self.status = SampleStatus.PENDING
        self.finish_reason = None
        self.reward = None
        self.loss_mask = None

    @property
    def turn_begin(self) -> int:
        """How many tokens there are before the newest turn: up to the last one that no policy produced."""
        begin = at = 0
        for version, count in self.versions:
            at += count
            begin = at if version == NO_VERSION else begin
        return begin

    @property
    def is_finished(self) -> bool:
        """Whether generation has ended with something that may be handed out."""
        return self.status in (SampleStatus.COMPLETED, SampleStatus.TRUNCATED)

    @property
    def oldest_version(self) -> int | None:
        """The oldest policy version that produced a token of this sample; ``None`` without such a token."""
        return min((version for version, _ in self.versions if version != NO_VERSION), default=None)


def _append(column: array[Any], values: Sequence[Any]) -> None:
    """Lists, which engines' answers are, are taken at once and not item by item."""
    if not isinstance(values, list):
        column.extend(values)
    elif len(values) < MIN_PACKED:
        column.fromlist(values)
    else:
        try:
            column.frombytes(struct.Struct(f"{len(values)}{column.typecode}").pack(*values))
        except struct.error:
            column.fromlist(values)  # its errors say what is wrong, and are the same at every length


@dataclass(slots=True)
class Group:
    """The samples of one prompt: the unit of buffering, mixing and hand-out.

    ``sampling`` are the sampling parameters in force; ``logprobs_kind`` says which distribution the
    log-probabilities are of: ``temperature`` (after temperature, before truncation) or ``raw``.
    """

    source: str
    group_index: int
    prompt: Prompt
    prompt_tokens: array[int]
    samples: list[Sample]
    sampling: dict[str, Any] = field(default_factory=dict)
    logprobs_kind: str = "temperature"

    @property
    def response_tokens(self) -> int:
        """Number of response tokens of all samples together."""
        return sum(len(sample.tokens) for sample in self.samples)

    @property
    def oldest_version(self) -> int | None:
        """The oldest policy version that produced a token of this group; ``None`` without such a token."""
        return min((v for sample in self.samples if (v := sample.oldest_version) is not None), default=None)
