"""Every metric of ``/metrics``, with its unit, its meaning, and how it is read from the status.

Invariants:

* Nothing is counted twice: every figure is one of the status, under a stable name that ends in its unit.
* Label values come from the config and from fixed lists. When a source or an engine is removed, so are its samples.
* Counters that the state keeps (groups) count since the run began, others (requests, calls) since the daemon started.
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
