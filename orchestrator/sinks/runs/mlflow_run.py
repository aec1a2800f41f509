"""MLflow, through its client: a tracking server, a database, or a directory."""

from __future__ import annotations

import os
from typing import Any

from orchestrator.sinks.service import PackageRun, RunIdentity

__all__ = ["open_run"]


class _Run:
    def __init__(self, client: Any, run_id: str) -> None:
        self._client = client
        self._run_id = run_id

    def log(self, step: dict[str, Any]) -> None:
        from mlflow.entities import Metric

        at_ms = round(1000 * step["time"])
        figures = {**step["metrics"], "rollout/policy_version": step["policy_version"]}
        metrics = [Metric(name, float(value), at_ms, step["step"]) for name, value in figures.items()]
        for begin in range(0, len(metrics), MOST_METRICS):
            self._client.log_batch(self._run_id, metrics=metrics[begin : begin + MOST_METRICS])

    def flush(self) -> None:
        """Nothing to do: each call returns when its metrics are stored."""

    def finish(self) -> None:
        self._client.set_terminated(self._run_id)


MOST_METRICS = 1000
"""What a tracking server accepts in one request."""


def open_run(options: dict[str, Any], identity: RunIdentity) -> PackageRun:
    """Options: ``tracking_uri``, ``experiment``, ``name``."""
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # the config asked for a directory
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # the feed retries
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=options["tracking_uri"])
    word = identity.read()
    if word is not None:
        try:
            client.update_run(word, status="RUNNING")
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
        else:
            return _Run(client, word)
    name = options["experiment"] or options["run"]
    known = client.get_experiment_by_name(name)
    experiment = client.create_experiment(name) if known is None else known.experiment_id
    run = client.create_run(experiment, run_name=options["name"] or options["run"])
    return _Run(client, identity.write(run.info.run_id))
