"""What ``/metrics`` exposes: a catalogue of self-describing metrics."""

from .catalogue import METRICS
from .exposition import render_metrics
from .metric import Metric

__all__ = ["METRICS", "Metric", "render_metrics"]
