"""trackio: a database in a directory, shown by ``trackio show``."""

from __future__ import annotations

import os
from typing import Any

from orchestrator.sinks.service import PackageRun, RunIdentity

__all__ = ["open_run"]


class _Run:
    def __init__(self, trackio: Any) -> None:
        self._trackio = trackio

    def log(self, step: dict[str, Any]) -> None:
        figures = {**step["metrics"], "rollout/policy_version": step["policy_version"]}
        self._trackio.log(figures, step=step["step"])

    def flush(self) -> None:
        """Nothing to do: the package's own thread writes within a second."""

    def finish(self) -> None:
        self._trackio.finish()


def open_run(options: dict[str, Any], _: RunIdentity) -> PackageRun:
    """Options: ``project``, ``name``, ``dir``."""
    os.environ["TRACKIO_DIR"] = options["dir"]  # read when the package is imported
    import trackio

    trackio.init(
        project=options["project"] or options["run"],
        name=options["name"] or options["run"],
        resume="allow",
        embed=False,
    )
    return _Run(trackio)
