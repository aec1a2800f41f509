"""The section ``metrics``: where the figures of each step go beside the log.

Invariants:

* A package that a sink needs is looked for and never imported here.
"""

from __future__ import annotations

import importlib.util
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, Field

from .fields import FilePath, Section, as_written, list_of, problem

__all__ = ["Metrics", "SinkSpec", "missing_package", "sink_options"]

PACKAGES: Final = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow", "trackio": "trackio"}
"""By kind of sink, the module that it needs; the extra that installs it is called as the kind."""


def missing_package(sink: SinkSpec) -> tuple[str, str] | None:
    """What is not installed that a sink needs, and what to do; ``None``: nothing."""
    module = PACKAGES[sink.kind]
    if importlib.util.find_spec(module) is None:
        return (
            f"{sink.kind} needs the package {module}, which is not installed",
            f"pip install 'rollout-orchestrator[{sink.kind}]'",
        )
    is_database = isinstance(sink, MlflowSink) and not sink.tracking_uri.startswith(("http:", "https:", "file:"))
    if is_database and importlib.util.find_spec("sqlalchemy") is None:
        return "a database as tracking_uri needs all of MLflow, and only its client is installed", "pip install mlflow"
    return None


class TensorBoardSink(Section):
    """Event files for TensorBoard."""

    kind: Literal["tensorboard"] = Field(description="TensorBoard, by the package tensorboardX.")
    dir: FilePath = as_written(
        "tensorboard", "Directory of the event files, in one of the run's name. Relative to the config file."
    )


class _Named(Section):
    project: str | None = Field(None, min_length=1, description="Project; null: the name of the run.")
    name: str | None = Field(None, min_length=1, description="Name of the run there; null: run.name.")
    dir: FilePath | None = Field(
        None, description="Directory of its files; null: one in run.state_dir. Relative to the config file."
    )


class WandbSink(_Named):
    """Weights & Biases."""

    kind: Literal["wandb"] = Field(description="Weights & Biases.")
    entity: str | None = Field(None, min_length=1, description="User or team; null: the default of who is logged in.")
    mode: Literal["online", "offline"] = Field(
        "online", description="online needs a login; offline keeps files for `wandb sync`."
    )
    tags: Annotated[tuple[str, ...], list_of("tags", "[curriculum]")] = Field(
        (), strict=False, description="Tags of the run."
    )


class TrackioSink(_Named):
    """trackio."""

    kind: Literal["trackio"] = Field(description="trackio: a database in a directory.")


def _tracking_uri(value: str) -> str:
    if "://" not in value and not value.startswith("file:"):
        raise problem(
            f"{value!r} is not the URI of an MLflow store",
            'write "http://HOST:PORT", "sqlite:////data/mlflow.db" or "file:/data/mlruns"',
        )
    return value


class MlflowSink(Section):
    """MLflow."""

    kind: Literal["mlflow"] = Field(description="MLflow.")
    tracking_uri: Annotated[str, AfterValidator(_tracking_uri)] = Field(
        description="Tracking server (http://…), database (sqlite:////…) or directory (file:/…)."
    )
    experiment: str | None = Field(None, min_length=1, description="Experiment; null: the name of the run.")
    name: str | None = Field(None, min_length=1, description="Name of the run there; null: run.name.")


SinkSpec = Annotated[TensorBoardSink | WandbSink | MlflowSink | TrackioSink, Field(discriminator="kind")]


class Metrics(Section):
    """Where the figures of each step go beside the log."""

    jsonl: bool = Field(True, description="Write metrics.jsonl in run.state_dir, a line a step.")
    max_bytes: Annotated[int, Field(ge=1 << 16, le=1 << 40)] = Field(
        67_108_864, description="Size in bytes at which metrics.jsonl is begun anew."
    )
    keep: Annotated[int, Field(ge=0, le=1000)] = Field(3, description="Older files of metrics.jsonl that are kept.")
    sinks: Annotated[tuple[SinkSpec, ...], list_of("sinks", "[{kind: tensorboard}]"), Field(max_length=16)] = Field(
        (), strict=False, description="Further places that the same figures are sent to."
    )


def sink_options(sink: SinkSpec) -> dict[str, Any]:
    """A sink as plain values."""
    return sink.model_dump(mode="json")
