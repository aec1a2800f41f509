"""Where the figures of each step go beside the log: ``metrics.jsonl``, and what researchers look at.

:class:`SinkFeed` is the way in: a bounded queue and a task for each sink, so that none of them holds anything up.
:class:`MetricsFile` writes ``metrics.jsonl``; :class:`PackageSink` has W&B, TensorBoard, MLflow or trackio write in a
process of its own. :func:`build_feeds` makes all that a run has.
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
