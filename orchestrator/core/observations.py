"""What a source's finished groups show: running statistics, for weights that follow the training.

Invariants:

* A fold over the records of the log: no clock and no randomness, so that a replay, or a snapshot and what follows it,
  gives the same numbers to the last bit.
* Every group that was scored counts, once, whether a filter kept it or not: statistics of kept groups alone would show
  a pass rate of one half wherever groups without a spread are dropped.
* What weights see changes only when a batch forms. Between two batches the plan stays what it is.
* Observations fade: one counts half as much :data:`HALF_LIFE_GROUPS` groups (or :data:`HALF_LIFE_BATCHES` batches)
  later, because the policy that it was made under has changed since.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

__all__ = ["HALF_LIFE_BATCHES", "HALF_LIFE_GROUPS", "NO_STATS", "PASS_REWARD", "Observations", "SourceStats"]

HALF_LIFE_GROUPS: Final = 128
"""A handful of batches: with 8 samples a group the pass rate is then known to about 2 %, and a week-long run's
statistics still follow the last hour."""

HALF_LIFE_BATCHES: Final = 8
"""For what is counted a batch."""

PASS_REWARD: Final = 0.5
"""A sample with at least this reward passes; of rewards that are 0 or 1, those that are 1."""

_FADE: Final = 0.5 ** (1 / HALF_LIFE_GROUPS)
_FADE_BATCH: Final = 0.5 ** (1 / HALF_LIFE_BATCHES)


@dataclass(frozen=True, slots=True)
class SourceStats:
    """One source as it was when the last batch formed; means fade (see the module), counts do not.

    ``groups`` and ``count`` are scored groups and rewards so far; ``all_groups`` the scored groups of all sources.
    ``recent`` is the faded number of groups that the means are of, ``all_recent`` that of all sources. ``mean`` and
    ``std`` are of the rewards, ``pass_rate`` is the share of samples that pass, ``signal`` the share of groups whose
    rewards differ. ``learnability`` is the mean of p·(1 − p), p being a prompt's pass rate as far as its group shows it
    (the unbiased estimate, up to 0.25), and ``advantage`` the mean distance of a reward from its group's mean.
    ``response_len`` is in tokens, ``throughput`` in scored groups a batch. ``weight`` is what was in force at the last
    batch, ``None`` if there was none yet.
    """

    groups: int = 0
    count: int = 0
    all_groups: int = 0
    recent: float = 0.0
    all_recent: float = 0.0
    mean: float = 0.0
    std: float = 0.0
    pass_rate: float = 0.0
    signal: float = 0.0
    learnability: float = 0.0
    advantage: float = 0.0
    response_len: float = 0.0
    throughput: float = 0.0
    weight: float | None = None


NO_STATS: Final = SourceStats()
"""Before anything was seen."""

_MEANS: Final = ("groups", "mean", "square", "passes", "signal", "learnability", "advantage", "length")


class Observations:
    """The running sums of one source; see the module's invariants."""

    def __init__(self) -> None:
        self.groups = 0
        self.count = 0
        self._sums = dict.fromkeys(_MEANS, 0.0)
        self._since_batch = 0
        self._throughput = [0.0, 0.0]  # faded groups, faded batches
        self.weight: float | None = None
        self._seen = NO_STATS

    def add(self, rewards: Sequence[float], lengths: Sequence[int]) -> None:
        """A scored group: its samples' rewards and response lengths. One without rewards counts nowhere."""
        n = len(rewards)
        if not n or not all(map(math.isfinite, rewards)):
            return
        mean = math.fsum(rewards) / n
        passes = sum(reward >= PASS_REWARD for reward in rewards) / n
        observed = (
            1.0,
            mean,
            math.fsum(reward * reward for reward in rewards) / n,
            passes,
            float(max(rewards) > min(rewards)),
            passes * (1.0 - passes) * (n / (n - 1) if n > 1 else 1.0),
            math.fsum(abs(reward - mean) for reward in rewards) / n,
            sum(lengths) / n,
        )
        for name, value in zip(_MEANS, observed, strict=True):
            self._sums[name] = _FADE * self._sums[name] + value
        self.groups += 1
        self.count += n
        self._since_batch += 1

    def batch_formed(self, weight: float | None) -> None:
        """A batch formed, with this weight if it is an adaptive one: weights see what was added so far."""
        self._throughput = [
            _FADE_BATCH * self._throughput[0] + self._since_batch,
            _FADE_BATCH * self._throughput[1] + 1,
        ]
        self._since_batch = 0
        self.weight = weight
        self._seen = self._now()

    def _now(self) -> SourceStats:
        total = self._sums["groups"]
        mean = {name: value / total if total else 0.0 for name, value in self._sums.items()}
        return SourceStats(
            groups=self.groups,
            count=self.count,
            recent=total,
            mean=mean["mean"],
            std=math.sqrt(max(0.0, mean["square"] - mean["mean"] ** 2)),
            pass_rate=mean["passes"],
            signal=mean["signal"],
            learnability=mean["learnability"],
            advantage=mean["advantage"],
            response_len=mean["length"],
            throughput=self._throughput[0] / self._throughput[1],
            weight=self.weight,
        )

    @property
    def seen(self) -> SourceStats:
        """What weights see; without what is of all sources."""
        return self._seen

    # -- snapshots -----------------------------------------------------------------------------------------------------

    def snapshot(self) -> dict[str, Any]:
        """JSON-compatible; :meth:`load` goes on exactly here."""
        return {
            "groups": self.groups,
            "count": self.count,
            "sums": [self._sums[name] for name in _MEANS],
            "since_batch": self._since_batch,
            "throughput": list(self._throughput),
            "weight": self.weight,
            "seen": {name: getattr(self._seen, name) for name in SourceStats.__slots__},
        }

    def load(self, data: Mapping[str, Any] | None) -> None:
        """Become what :meth:`snapshot` described; of a snapshot that has none: nothing was seen yet."""
        if data is None:
            self.__init__()  # type: ignore[misc]
            return
        self.groups, self.count = data["groups"], data["count"]
        self._sums = dict(zip(_MEANS, data["sums"], strict=True))
        self._since_batch, self._throughput = data["since_batch"], list(data["throughput"])
        self.weight, self._seen = data["weight"], SourceStats(**data["seen"])
