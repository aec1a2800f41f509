"""Prometheus metrics, made from the status object when they are scraped.

Invariants:

* The exposition has the catalogue and the library's metrics of the process. Nothing is kept between two scrapes.
* We write the lines ourselves, exactly as the library would. The library makes three objects for each, which with many
  sources blocked the event loop for longer than the rest of a scrape.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import generate_latest
from prometheus_client.utils import floatToGoString

from .catalogue import METRICS

__all__ = ["render_metrics"]

_ESCAPED: Final = str.maketrans({"\\": r"\\", "\n": r"\n", '"': r"\""})


def render_metrics(status: Mapping[str, Any]) -> bytes:
    """The text exposition of a status whose history has the newest step."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    return "".join(_lines(status)).encode() + generate_latest(registry)


def _lines(status: Mapping[str, Any]) -> Iterator[str]:
    texts: dict[tuple[tuple[str, ...], tuple[str, ...]], str] = {}  # by labels: most metrics share theirs with others
    for metric in (metric for section in METRICS.values() for metric in section):
        name, labels = metric.exposed_name, metric.labels
        meaning = metric.meaning.replace("\\", r"\\").replace("\n", r"\n")
        yield f"# HELP {name} {meaning}\n# TYPE {name} {metric.kind}\n"
        for values, number in metric.read(status):
            text = texts.get((labels, values))
            if text is None:
                text = texts[labels, values] = _label_text(labels, values)
            yield f"{name}{text} {floatToGoString(number)}\n"  # type: ignore[no-untyped-call]


def _label_text(labels: tuple[str, ...], values: tuple[str, ...]) -> str:
    pairs = sorted(zip(labels, values, strict=True))
    return "{" + ",".join([f'{label}="{value.translate(_ESCAPED)}"' for label, value in pairs]) + "}" if pairs else ""
