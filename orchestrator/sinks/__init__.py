"""Where the figures of each step go besides the log: ``metrics.jsonl``, and experiment trackers.

:class:`SinkFeed` is the entry: a bounded queue and a task for each sink, so that no sink delays anything.
:class:`MetricsFile` writes ``metrics.jsonl``. :class:`PackageSink` runs W&B, TensorBoard, MLflow or trackio in a
process of its own. :func:`build_feeds` makes all feeds of a run.
"""

from .build import build_feeds
from .feed import SinkFailed, SinkFeed, SinkStatistics, StepFigures
from .metrics_file import METRICS_FILE, MetricsFile, read_steps
from .package import PackageSink

__all__ = [
    "METRICS_FILE",
    "MetricsFile",
    "PackageSink",
    "SinkFailed",
    "SinkFeed",
    "SinkStatistics",
    "StepFigures",
    "build_feeds",
    "read_steps",
]
