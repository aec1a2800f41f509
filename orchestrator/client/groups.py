"""Groups and samples as a trainer sees them: views into the received bytes.

Invariants:

* A group's header is parsed, and its columns are checked (``checks.py``), when something of the group is first asked
  for; what it says of its samples is checked when that is. Until then it costs nothing.
* Arrays are views: no copy, writable, and they keep the memory of the whole batch (``buffers.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from orchestrator.errors import FrameError
from orchestrator.frames import PREFIX_BYTES, GroupFrame, parse_prefix
from orchestrator.records import NO_VERSION, SampleStatus, Versions

from .checks import check_columns, check_samples, rewards_of

__all__ = ["Array", "RolloutGroup", "RolloutSample"]

Array = np.ndarray[Any, Any]


class RolloutSample:
    """One response; ``i`` is its place in the group. Arrays are views of length T, its response tokens."""

    __slots__ = ("_group", "_header", "i")

    def __init__(self, group: RolloutGroup, i: int, header: dict[str, Any]) -> None:
        self._group = group
        self._header = header
        self.i = i

    @property
    def index(self) -> int:
        """Unique in the run."""
        index: int = self._header["index"]
        return index

    @property
    def status(self) -> SampleStatus:
        """``completed`` or ``truncated``."""
        return SampleStatus(self._header["status"])

    @property
    def reward(self) -> float:
        """Finite."""
        return float(self._header["reward"])

    @property
    def versions(self) -> Versions:
        """Run-length policy versions: ``[[version, number of tokens], …]`` in token order."""
        versions: Versions = self._header["versions"]
        return versions

    @property
    def oldest_version(self) -> int | None:
        """The oldest policy version that produced a token; ``None`` without such a token."""
        return min((version for version, _ in self.versions if version != NO_VERSION), default=None)

    @property
    def finish_reason(self) -> str | None:
        """What the engine gave as the reason."""
        reason: str | None = self._header.get("finish_reason")
        return reason

    @property
    def metadata(self) -> dict[str, Any]:
        """What reward and producer left here."""
        metadata: dict[str, Any] = self._header.get("metadata") or {}
        return metadata

    @property
    def response_tokens(self) -> Array:
        """[T] int32, end-of-sequence included."""
        return self._group.response_tokens[self._slice]

    @property
    def logprobs(self) -> Array | None:
        """[T] float32; ``None`` where the engine gave none."""
        return None if self._group.logprobs is None else self._group.logprobs[self._slice]

    @property
    def loss_mask(self) -> Array:
        """[T] uint8: 1 for tokens to train on."""
        return self._group.loss_mask[self._slice]

    @property
    def text(self) -> str:
        """The response as text; empty where the frame has none."""
        return self._group.text_of(self.i)

    @property
    def _slice(self) -> slice:
        offsets = self._group.offsets
        return slice(offsets[self.i], offsets[self.i + 1])

    def __repr__(self) -> str:
        return f"<RolloutSample {self.index} {self.status} reward={self.reward:g}>"


class RolloutGroup:
    """The samples of one prompt. n samples, P prompt tokens, T response tokens in all.

    Args:
        frame: the bytes of one group frame.

    Every property raises ``FrameError`` if the frame is malformed.
    """

    # Kept by hand: `cached_property` takes a lock at each first look, and a batch has hundreds of columns.
    __slots__ = ("_arrays", "_bytes", "_frame", "_has_sound_samples", "_offsets", "_texts")

    def __init__(self, frame: memoryview) -> None:
        self._bytes = frame
        self._frame: GroupFrame | None = None
        self._has_sound_samples = False
        self._offsets: list[int] = []
        self._texts: list[int] = []
        self._arrays: dict[str, Array] = {}

    @classmethod
    def from_frames(cls, payload: bytes | bytearray | memoryview) -> list[RolloutGroup]:
        """The groups of a payload, told apart by their prefixes alone.

        Raises:
            FrameError: these are not group frames, one after the other.
        """
        view, groups, begin = memoryview(payload), [], 0
        while begin < len(view):
            end = begin + parse_prefix(view[begin : begin + PREFIX_BYTES]).frame_bytes
            if end > len(view):
                raise FrameError(f"a group frame of {end - begin} bytes is cut off after {len(view) - begin}")
            groups.append(cls(view[begin:end]))
            begin = end
        return groups

    @property
    def frame(self) -> GroupFrame:
        """The parsed frame, with columns that add up."""
        return self._frame or self._parse()

    def _parse(self) -> GroupFrame:
        frame = GroupFrame(self._bytes)
        self._offsets = check_columns(frame)
        self._frame = frame
        return frame

    def _samples(self) -> list[dict[str, Any]]:
        """What the header says of each sample, checked."""
        frame = self.frame
        if not self._has_sound_samples:
            check_samples(frame, self._offsets)
            self._has_sound_samples = True
        samples: list[dict[str, Any]] = frame.header["samples"]
        return samples

    def _column(self, name: str) -> Array:
        array = self._arrays.get(name)
        if array is None:
            array = self._arrays[name] = self.frame.column(name)
        return array

    @property
    def source(self) -> str:
        """Name of the data source."""
        source: str = self.frame.header["source"]
        return source

    @property
    def group_index(self) -> int:
        """Unique in the run."""
        index: int = self.frame.header["group_index"]
        return index

    @property
    def prompt_index(self) -> int | None:
        """Row of the prompt in the source's file, from 0."""
        index: int | None = self.frame.header.get("prompt_index")
        return index

    @property
    def prompt(self) -> Any:
        """Text, chat messages, or ``None`` for a prompt of token ids."""
        return self.frame.json("prompt")

    @property
    def label(self) -> Any:
        """The prompt's label."""
        return self.frame.json("label")

    @property
    def metadata(self) -> dict[str, Any]:
        """The prompt's metadata."""
        return self.frame.json("metadata") or {}

    @property
    def sampling(self) -> dict[str, Any]:
        """Sampling parameters that were in force."""
        return self.frame.header.get("sampling") or {}

    @property
    def logprobs_kind(self) -> str:
        """Which distribution ``logprobs`` are of: ``temperature`` (after it, before truncation) or ``raw``."""
        kind: str = self.frame.header.get("logprobs", "temperature")
        return kind

    @property
    def samples(self) -> Sequence[RolloutSample]:
        """[n]."""
        # New objects each time: kept ones would form a cycle with the group, whose memory waits for the collector.
        return tuple(RolloutSample(self, i, header) for i, header in enumerate(self._samples()))

    @property
    def n(self) -> int:
        """Number of samples."""
        return len(self.frame.header["samples"])

    @property
    def rewards(self) -> list[float]:
        """[n]."""
        return rewards_of(self.frame)

    @property
    def prompt_tokens(self) -> Array:
        """[P] int32."""
        return self._column("prompt_tokens")

    @property
    def offsets(self) -> list[int]:
        """[n+1]: where each sample's tokens begin and end in ``response_tokens``, ``logprobs`` and ``loss_mask``."""
        if self._frame is None:
            self._parse()
        return self._offsets

    @property
    def response_tokens(self) -> Array:
        """[T] int32: the samples' tokens, one after the other."""
        return self._column("response_tokens")

    @property
    def logprobs(self) -> Array | None:
        """[T] float32; ``None`` where the engine gave none."""
        return self._column("logprobs") if "logprobs" in self.frame else None

    @property
    def loss_mask(self) -> Array:
        """[T] uint8; all ones where the frame has none."""
        if "loss_mask" not in self.frame and "loss_mask" not in self._arrays:
            self._arrays["loss_mask"] = np.ones(self.offsets[-1], np.uint8)
        return self._column("loss_mask")

    @property
    def token_versions(self) -> Array:
        """[T] int64: the policy version of every response token; −1 for tokens of tools and users. A copy."""
        runs = [run for sample in self._samples() for run in sample["versions"]]
        pairs = np.array(runs, np.int64).reshape(-1, 2)
        return np.repeat(pairs[:, 0], pairs[:, 1])

    def text_of(self, i: int) -> str:
        """The text of sample ``i``."""
        if "text" not in self.frame:
            return ""
        if not self._texts:
            self._texts = self.frame.integers("text_offsets")
        begin, end = self._texts[i : i + 2]
        try:
            return self.frame.column("text")[begin:end].tobytes().decode()
        except UnicodeDecodeError as error:
            raise FrameError(f"the text of sample {i} is not UTF-8: {error}") from None

    def __repr__(self) -> str:
        return f"<RolloutGroup {self.group_index} of {self.source!r}: {self.n} samples>"
