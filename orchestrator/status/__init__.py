"""What the daemon reports about itself: status, the cause of a late batch, the metrics of each step."""

from .cause import Facts, explain
from .history import MAX_POINTS, StepHistory, report_point, step_point
from .http import StatusServer
from .report import RunFacts, build_status
from .step_metrics import StepMetrics, StepReport

__all__ = [
    "MAX_POINTS",
    "Facts",
    "RunFacts",
    "StatusServer",
    "StepHistory",
    "StepMetrics",
    "StepReport",
    "build_status",
    "explain",
    "report_point",
    "step_point",
]
