"""When a first token is late: an engine that answers, but long after the others, must not hold samples back.

A request without its first token is late when it waits for longer than the others would ever need. What they need is
estimated as TCP estimates its retransmission timeout (RFC 6298): a smoothed mean plus four smoothed deviations. A late
request moves to an engine that has room now; nothing is lost, because nothing had come.

Invariants:

* Pure: times come from the caller, in seconds.
* Nothing is late before ``FIRST_SIGHT`` first tokens of another engine were seen, nor within ``LATE_FLOOR_S``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

__all__ = ["FirstToken", "late_after"]

LATE_FLOOR_S: Final = 1.0
"""Moving a request repeats its prefill; a second is more than most take."""

LATE_FACTOR: Final = 4.0
"""On what the fastest other engine needs at most: engines may differ in hardware, and prompts in length."""

FIRST_SIGHT: Final = 8
"""First tokens that an engine must have given before others are measured against it."""

MEAN_GAIN: Final = 1 / 8
DEVIATION_GAIN: Final = 1 / 4
DEVIATIONS: Final = 4.0
"""RFC 6298, section 2: alpha, beta and K."""


@dataclass(slots=True)
class FirstToken:
    """Seconds from a request to its first token, at one engine: smoothed mean and deviation, and how many were seen."""

    mean_s: float = 0.0
    deviation_s: float = 0.0
    seen: int = 0

    def add(self, seconds: float) -> None:
        """One more was seen."""
        if self.seen == 0:
            self.mean_s, self.deviation_s = seconds, seconds / 2
        else:
            self.deviation_s += DEVIATION_GAIN * (abs(seconds - self.mean_s) - self.deviation_s)
            self.mean_s += MEAN_GAIN * (seconds - self.mean_s)
        self.seen += 1

    @property
    def longest_s(self) -> float | None:
        """What it needs at most, as far as one can tell; ``None``: too few were seen."""
        return self.mean_s + DEVIATIONS * self.deviation_s if self.seen >= FIRST_SIGHT else None


def late_after(others: Iterable[FirstToken]) -> float | None:
    """After how many seconds without a token a request is late, given other engines; ``None``: never."""
    known = [longest for other in others if (longest := other.longest_s) is not None]
    return max(LATE_FLOOR_S, LATE_FACTOR * min(known)) if known else None
