"""TensorBoard, through the package tensorboardX: event files in a directory, a new one whenever the process starts.

The package's own ``SummaryWriter`` hands events to a thread that its ``flush`` does not wait for. ``EventsWriter``,
below it, writes at once, so that an accepted step is on disk.
"""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

from orchestrator.sinks.service import PackageRun, RunIdentity

__all__ = ["open_run"]


class _Run:
    def __init__(self, directory: Path) -> None:
        from tensorboardX.event_file_writer import EventsWriter

        directory.mkdir(parents=True, exist_ok=True)
        # A random suffix, because the package tells files apart only by the second in which they start.
        self._writer = EventsWriter(str(directory / "events"), f".{secrets.token_hex(4)}")

    def log(self, step: dict[str, Any]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        metrics = {**step["metrics"], "rollout/policy_version": step["policy_version"]}
        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._writer.write_event(Event(wall_time=step["time"], step=step["step"], summary=Summary(value=values)))

    def flush(self) -> None:
        self._writer.flush()

    def finish(self) -> None:
        self._writer.close()


def open_run(options: dict[str, Any], _: RunIdentity) -> PackageRun:
    """Options: ``dir``, in which the run has a directory of its name."""
    return _Run(Path(options["dir"]) / options["run"])
