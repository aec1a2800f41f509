"""The tables of ``docs/observing.md``, from the code that makes the figures.

``.venv/bin/python scripts/observing.py docs/observing.md`` writes them. A test fails when the committed tables differ
from what the code says.

Invariants:

* Only the text between the marks of a table is written; people write the rest of the page.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from orchestrator.status.metrics import METRICS
from orchestrator.status.step_names import RUN_NAMES, SOURCE_NAMES

__all__ = ["render_page"]


def render_page(text: str) -> str:
    """The page with its tables brought up to date.

    Raises:
        ValueError: the page does not have the marks of a table.
    """
    for name, table in (("step figures", _step_figures()), ("metrics", _metrics())):
        begin, end = f"<!-- {name}: written by scripts/observing.py -->", f"<!-- end of {name} -->"
        if begin not in text or end not in text:
            raise ValueError(f"the page needs the lines {begin!r} and {end!r}")
        head, _, rest = text.partition(begin)
        text = f"{head}{begin}\n{table}\n{end}{rest.partition(end)[2]}"
    return text


def _step_figures() -> str:
    rows = [(f"`{name}`", unit, meaning) for name, (unit, meaning) in RUN_NAMES.items()]
    rows += [(f"`rollout/{{source}}/{name}`", unit, meaning) for name, (unit, meaning) in SOURCE_NAMES.items()]
    return _table(("name", "unit", "meaning"), rows)


def _metrics() -> str:
    parts = []
    for heading, metrics in METRICS.items():
        rows = [
            (
                f"`{metric.exposed_name}`",
                metric.kind,
                ", ".join(f"`{label}`" for label in metric.labels),
                metric.unit,
                metric.meaning,
            )
            for metric in metrics
        ]
        parts.append(f"**{heading}**\n\n{_table(('metric', 'kind', 'labels', 'unit', 'meaning'), rows)}")
    return "\n\n".join(parts)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    columns = tuple(head)
    lines = [columns, ("---",) * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(render_page(page.read_text(encoding="utf-8")), encoding="utf-8")
