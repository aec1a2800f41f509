"""Every metric of ``/metrics``, with its unit, its meaning, and where the status has it.

Invariants:

* Nothing is counted twice: every figure is one of the status, under a stable name that ends in its unit.
* Label values come from the config and from fixed lists; a source or an engine that goes takes its samples along.
* Counters count since the run began where the state has them (groups), else since the daemon started (requests, calls).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from .batch import BATCH
from .engines import ENGINES
from .metric import Metric
from .outlets import OUTLETS
from .run import RUN
from .sources import SOURCES

__all__ = ["METRICS"]

METRICS: Final[Mapping[str, tuple[Metric, ...]]] = {
    "The run": RUN,
    "The newest batch": BATCH,
    "Sources": SOURCES,
    "Engines": ENGINES,
    "Archive and sinks of the metrics": OUTLETS,
}
"""By the heading that they have in ``docs/observing.md``."""
