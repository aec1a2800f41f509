"""A batch as a trainer sees it: groups, flat arrays over all samples, and what policy gradients need of them.

Shapes: G groups, S samples in all (of the first group first), T response tokens in all, L the longest sequence.

Invariants:

* Receiving a batch costs the transfer: groups are parsed when they are looked at (``groups.py``).
* Arrays of a group are views; arrays of the batch are joined from them and are copies, made when asked for.
* Everything is in the same order: sample s has ``rewards[s]``, ``sources[s]``, row s of ``padded()``, and the tokens
  ``response_offsets[s]:response_offsets[s+1]`` of the flat arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np

from orchestrator.errors import FrameError

from .buffers import Bytes
from .groups import Array, RolloutGroup, RolloutSample
from .padding import Columns, pad

__all__ = ["Batch"]


class Batch:
    """One rank's share of one step.

    Attributes:
        lease: what ``ack`` and ``nack`` want; the same when the batch is handed out again.
        step: of the rollout, from 0.
        policy_version: in force when the batch was formed.
        weights: of each source at this step, for the whole batch.
        counts: groups of each source, for the whole batch.
        groups: [G] of this share.
    """

    def __init__(
        self,
        *,
        lease: str,
        step: int,
        policy_version: int,
        weights: dict[str, float],
        counts: dict[str, int],
        groups: Sequence[RolloutGroup],
    ) -> None:
        self.lease = lease
        self.step = step
        self.policy_version = policy_version
        self.weights = weights
        self.counts = counts
        self.groups = groups

    @classmethod
    def from_answer(cls, result: dict[str, Any], payload: Bytes | None) -> Batch:
        """The batch of a ``get_batch`` answer.

        Raises:
            FrameError: the result lacks something, or the payload is not as many frames as it says.
        """
        lease, step, version = result.get("lease"), result.get("step"), result.get("policy_version")
        if not isinstance(lease, str) or type(step) is not int or type(version) is not int:
            raise FrameError("a batch needs a string `lease` and integers `step` and `policy_version`")
        weights, counts = result.get("weights", {}), result.get("counts", {})
        if not isinstance(weights, dict) or not isinstance(counts, dict):
            raise FrameError("`weights` and `counts` of a batch must be objects")
        groups = [] if payload is None else RolloutGroup.from_frames(payload.data)
        if len(groups) != result.get("groups"):
            raise FrameError(f"{result.get('groups')} groups were announced, but {len(groups)} arrived")
        return cls(lease=lease, step=step, policy_version=version, weights=weights, counts=counts, groups=groups)

    @property
    def samples(self) -> list[RolloutSample]:
        """[S]."""
        return [sample for group in self.groups for sample in group.samples]

    # -- one value a sample --------------------------------------------------------------------------------------------

    @cached_property
    def group_sizes(self) -> Array:
        """[G] int64: samples of each group."""
        return np.array([group.n for group in self.groups], np.int64)

    @property
    def rewards(self) -> Array:
        """[S] float32."""
        return np.array(self._rewards, np.float32)

    @property
    def _rewards(self) -> list[float]:
        return [reward for group in self.groups for reward in group.rewards]

    @property
    def group_ids(self) -> Array:
        """[S] int64: the ``group_index`` of each sample."""
        return np.repeat(np.array([group.group_index for group in self.groups], np.int64), self.group_sizes)

    @property
    def sources(self) -> list[str]:
        """[S]: the source of each sample."""
        return [group.source for group in self.groups for _ in range(group.n)]

    @property
    def prompt_lengths(self) -> Array:
        """[S] int64, in tokens."""
        return np.repeat(np.array([len(group.prompt_tokens) for group in self.groups], np.int64), self.group_sizes)

    @cached_property
    def response_offsets(self) -> Array:
        """[S+1] int64, into the flat arrays."""
        lengths = [end - begin for g in self.groups for begin, end in zip(g.offsets, g.offsets[1:], strict=False)]
        return np.concatenate((np.zeros(1, np.int64), np.cumsum(np.array(lengths, np.int64))))

    @property
    def response_lengths(self) -> Array:
        """[S] int64, in tokens."""
        return np.diff(self.response_offsets)

    def staleness(self, version: int | None = None) -> Array:
        """[S] int64: ``version`` minus the oldest version that produced a token of the sample; 0 without such a token.

        Args:
            version: default: the policy version in force when the batch was formed.
        """
        now = self.policy_version if version is None else version
        oldest = [sample.oldest_version for sample in self.samples]
        return np.array([0 if v is None else now - v for v in oldest], np.int64)

    def advantages(self, std: bool = True, eps: float = 1e-6, *, ddof: int = 0) -> Array:
        """[S] float32: rewards relative to their group, (r − mean) / (std + eps).

        The group-relative advantage of GRPO (DeepSeekMath, arXiv:2402.03300, section 4.1.2); without division by the
        standard deviation that of Dr. GRPO (arXiv:2503.20783), which removes its bias towards very easy and very hard
        prompts. A group whose rewards are all the same has advantage 0.

        Args:
            std: divide by the group's standard deviation.
            eps: keeps that division finite.
            ddof: 0: population standard deviation; 1: the sample one, which ``torch.std`` computes unless told.
        """
        advantages = np.array(self._rewards, np.float64)
        end = 0
        for size in self.group_sizes.tolist():
            begin, end = end, end + size
            if not size:
                continue
            rewards = advantages[begin:end]
            scale = float(rewards.std(ddof=ddof)) + eps if std and size > ddof else 1.0
            rewards -= rewards.mean()
            rewards /= scale
        return advantages.astype(np.float32)

    # -- one value a response token ------------------------------------------------------------------------------------

    @property
    def response_tokens(self) -> Array:
        """[T] int32. A copy."""
        return self._joined(lambda group: group.response_tokens, np.int32)

    @property
    def logprobs(self) -> Array | None:
        """[T] float32. A copy; ``None`` unless every group has them."""
        parts = [group.logprobs for group in self.groups]
        known = [part for part in parts if part is not None]
        return None if len(known) < len(parts) else np.concatenate((np.empty(0, np.float32), *known))

    @property
    def loss_mask(self) -> Array:
        """[T] uint8: 1 for tokens to train on. A copy."""
        return self._joined(lambda group: group.loss_mask, np.uint8)

    @property
    def token_versions(self) -> Array:
        """[T] int64: the policy version of every token; −1 for tokens of tools and users."""
        return self._joined(lambda group: group.token_versions, np.int64)

    def loss_mask_against(self, version: int) -> Array:
        """[T] uint8: the loss mask without the tokens of policies older than ``version``.

        With ``batch.policy_version``: only what the policy at hand-out produced. ``padded(loss_mask=…)`` takes it.
        """
        return self.loss_mask * (self.token_versions >= version).astype(np.uint8)

    def _joined(self, part: Callable[[RolloutGroup], Array], dtype: Any) -> Array:
        return np.concatenate((np.empty(0, dtype), *map(part, self.groups)))

    # -- rectangles ----------------------------------------------------------------------------------------------------

    def padded(
        self,
        pad_token_id: int = 0,
        max_len: int | None = None,
        side: Literal["right", "left"] = "right",
        *,
        loss_mask: Array | None = None,
    ) -> dict[str, Array]:
        """Prompt and response of every sample in rows of equal length.

        Args:
            pad_token_id: what fills ``tokens``; everything else is filled with 0.
            max_len: longest row; what a sequence has beyond it is cut off its end, and ``is_cut`` says so.
            side: where the filling goes.
            loss_mask: [T], in place of the batch's own (``loss_mask_against``).

        Returns:
            ``tokens`` [S, L] int32. ``attention_mask`` [S, L] bool: not filling. ``response_mask`` [S, L] bool:
            response tokens. ``loss_mask`` [S, L] bool: response tokens to train on. ``logprobs`` [S, L] float32, at
            the place of the token that they are of; absent unless every group has them. ``is_cut`` [S] bool.
            ``rewards`` [S] float32. ``group_ids``, ``prompt_lengths``, ``response_lengths`` [S] int64 (before
            cutting).

        Raises:
            ValueError: ``loss_mask`` is of another length, ``max_len`` is below 1, or ``side`` is neither.
        """
        columns = Columns(
            prompts=[(group.prompt_tokens, group.n) for group in self.groups],
            prompt_lengths=self.prompt_lengths,
            response_lengths=self.response_lengths,
            rewards=self.rewards,
            group_ids=self.group_ids,
            response_tokens=self.response_tokens,
            loss_mask=self.loss_mask if loss_mask is None else np.asarray(loss_mask),
            logprobs=self.logprobs,
        )
        return pad(columns, pad_token_id, max_len, side)

    def to_torch(self, **options: Any) -> dict[str, Any]:
        """:meth:`padded` as torch tensors, sharing its memory.

        Arrays of a group or a sample become tensors in the same way, without a copy: ``torch.from_numpy(array)``.

        Raises:
            ImportError: torch is not installed.
        """
        try:
            import torch
        except ImportError as error:
            raise ImportError("Batch.to_torch needs torch; install it, or use Batch.padded (numpy)") from error
        return {name: torch.from_numpy(array) for name, array in self.padded(**options).items()}

    def __repr__(self) -> str:
        return f"<Batch of step {self.step}: {len(self.groups)} groups, lease {self.lease}>"
