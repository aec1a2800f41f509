"""Weights & Biases. The step is a metric of its own, so that repeated steps are accepted."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

from orchestrator.sinks.service import PackageRun, RunIdentity

__all__ = ["open_run"]

STEP = "rollout/step"


class _Run:
    def __init__(self, run: Any) -> None:
        self._run = run
        run.define_metric(STEP)
        run.define_metric("*", step_metric=STEP)

    def log(self, step: dict[str, Any]) -> None:
        self._run.log({**step["metrics"], "rollout/policy_version": step["policy_version"], STEP: step["step"]})

    def flush(self) -> None:
        """Nothing to do: the package's own process has the steps already."""

    def finish(self) -> None:
        self._run.finish()


def open_run(options: dict[str, Any], identity: RunIdentity) -> PackageRun:
    """Options: ``project``, ``name``, ``entity``, ``mode``, ``tags``, ``dir``."""
    import wandb

    word = identity.read() or identity.write(secrets.token_hex(8))
    Path(options["dir"]).mkdir(parents=True, exist_ok=True)
    run = wandb.init(
        project=options["project"] or options["run"],
        name=options["name"] or options["run"],
        entity=options["entity"],
        mode=options["mode"],
        tags=options["tags"] or None,
        dir=options["dir"],
        id=word,
        resume="allow",
        settings=wandb.Settings(console="off", silent=True),
    )
    return _Run(run)
