"""What ``/metrics`` exposes: a catalogue of metrics, each of which says all of itself."""

from .catalogue import METRICS
from .exposition import render_metrics
from .metric import Metric

__all__ = ["METRICS", "Metric", "render_metrics"]
