"""Are short responses preferred? Response lengths that were handed out, against those that were launched.

Groups that finish early are short ones. If batches took whatever is finished, they would be shorter than what the
policy says; and where the old is dropped as stale, long responses would never be trained on. Launch order with bounded
overtaking (``source_state.py``) is to prevent that; here it is measured.

Invariants:

* What is compared with is a fair sample: of the groups launched before the oldest one in flight, all have ended, long
  and short. A group counts as launched when no older one is in flight any more.
* Groups that were not scored (failed, given up) have no length and do not count; they count where they are dropped.
* A fold over the records of the log, as everything that a source has.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

__all__ = ["LengthBias", "Lengths"]

_KINDS: Final = ("launched", "kept", "overtaken")


@dataclass(slots=True)
class Lengths:
    """Groups, their samples, and the response tokens of all of them."""

    groups: int = 0
    samples: int = 0
    tokens: int = 0

    def add(self, samples: int, tokens: int) -> None:
        """One more group."""
        self.groups += 1
        self.samples += samples
        self.tokens += tokens

    @property
    def mean(self) -> float:
        """Tokens of a response; 0 without any."""
        return self.tokens / self.samples if self.samples else 0.0


class LengthBias:
    """The lengths of one source.

    ``launched``: of all groups that were scored, whether a filter kept them or not; ``kept``: of those that it kept;
    ``overtaken``: of groups that younger ones were handed out before.
    """

    def __init__(self) -> None:
        self.launched = Lengths()
        self.kept = Lengths()
        self.overtaken = Lengths()
        self._ended: list[tuple[int, bool, int, int]] = []  # a heap: group index, whether kept, samples, tokens

    def ended(
        self, group_index: int, lengths: Sequence[int], *, kept: bool, overtaken: int, oldest: int | None
    ) -> None:
        """A group was scored.

        Args:
            group_index: of the group.
            lengths: of its responses, in tokens.
            kept: whether the filter kept it.
            overtaken: in how many batches younger ones went before it.
            oldest: the oldest group that is still in flight; ``None``: none is.
        """
        samples, tokens = len(lengths), sum(lengths)
        heapq.heappush(self._ended, (group_index, kept, samples, tokens))
        if overtaken:
            self.overtaken.add(samples, tokens)
        self.settle(oldest)

    def settle(self, oldest: int | None) -> None:
        """Count the groups that no older one is in flight of any more."""
        while self._ended and (oldest is None or self._ended[0][0] < oldest):
            _, kept, samples, tokens = heapq.heappop(self._ended)
            self.launched.add(samples, tokens)
            if kept:
                self.kept.add(samples, tokens)

    def report(self, handed_out: Lengths) -> dict[str, Any]:
        """Mean lengths and biases (see :meth:`bias`), JSON-compatible."""
        return {
            "handed_out": handed_out.mean,
            **{kind: getattr(self, kind).mean for kind in _KINDS},
            "overtaken_groups": self.overtaken.groups,
            "bias": self.bias(handed_out),
        }

    def bias(self, handed_out: Lengths) -> dict[str, float]:
        """How much longer (above 0) or shorter (below 0) handed-out responses are, as a share.

        ``overtaking``: than those launched and kept; ``total``: than all launched ones, so that it has the effect of
        filters in it too.
        """
        return {
            "overtaking": _relative(handed_out, self.kept),
            "total": _relative(handed_out, self.launched),
        }

    # -- snapshots -----------------------------------------------------------------------------------------------------

    def snapshot(self) -> dict[str, Any]:
        """JSON-compatible; :meth:`load` goes on exactly here."""
        sums = {kind: getattr(self, kind) for kind in _KINDS}
        return {kind: [of.groups, of.samples, of.tokens] for kind, of in sums.items()} | {"ended": sorted(self._ended)}

    def load(self, data: Mapping[str, Any] | None) -> None:
        """Become what :meth:`snapshot` described; of a snapshot that has none: nothing was launched yet."""
        for kind in _KINDS:
            setattr(self, kind, Lengths(*data[kind]) if data is not None else Lengths())
        self._ended = [(i, kept, n, tokens) for i, kept, n, tokens in data["ended"]] if data is not None else []


def _relative(one: Lengths, other: Lengths) -> float:
    mean, other_mean = one.mean, other.mean
    return mean / other_mean - 1.0 if mean and other_mean else 0.0
