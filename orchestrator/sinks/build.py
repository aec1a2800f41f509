"""The feeds of a run, from plain values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from structlog.typing import FilteringBoundLogger

from .feed import SinkFeed
from .metrics_file import METRICS_FILE, MetricsFile
from .package import PackageSink

__all__ = ["build_feeds"]

FOLDER: Final = "sinks"
"""In the state directory: the identities of the sinks' runs, and the files of their packages."""


def build_feeds(
    sinks: Sequence[Mapping[str, Any]],
    *,
    run: str,
    state_dir: Path,
    log: FilteringBoundLogger,
    file: tuple[int, int] | None,
) -> list[SinkFeed]:
    """Make the feeds; nothing is started.

    Args:
        sinks: of the config, each with its ``kind``; a ``dir`` that is ``None`` is one in the state directory.
        run: name of the run.
        state_dir: the state directory.
        log: for their events.
        file: size in bytes and number of older files of ``metrics.jsonl``; ``None``: it is not written.
    """
    feeds = []
    if file is not None:
        written = MetricsFile(state_dir, max_bytes=file[0], keep=file[1])
        feeds.append(SinkFeed(METRICS_FILE, str(state_dir / METRICS_FILE), written, log=log))
    seen: Counter[str] = Counter()
    for sink in sinks:
        kind = sink["kind"]
        seen[kind] += 1
        name = kind if seen[kind] == 1 else f"{kind}-{seen[kind]}"
        options = {**sink, "run": run, "identity": str(state_dir / FOLDER / f"{name}.id")}
        if options.get("dir", "") is None:
            options["dir"] = str(state_dir / FOLDER / name)
        where = options.get("tracking_uri") or options.get("dir")
        feeds.append(SinkFeed(name, str(where), PackageSink(options), log=log))
    return feeds
