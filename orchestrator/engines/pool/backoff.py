"""How long to wait after failures: exponential with full jitter, so that no storm of retries forms."""

from __future__ import annotations

import random
from typing import Final

__all__ = ["backoff"]

FIRST_BACKOFF_S: Final = 0.1
"""About the time of a new connection and a short answer."""

MAX_BACKOFF_S: Final = 5.0
"""An engine that comes back is found by its probe within a second; more waiting would only idle it."""

MAX_DOUBLINGS: Final = 10
"""More would overflow after a long outage."""


def backoff(jitter: random.Random, failures: int) -> float:
    """Seconds to wait after so many failures in a row."""
    return jitter.uniform(0, min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2 ** min(failures, MAX_DOUBLINGS)))
