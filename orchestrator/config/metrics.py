"""The section ``metrics``: where the figures of each step go beside the log.

Invariants:

* A package that a sink needs is looked for and never imported here.
"""

from __future__ import annotations

import importlib.util
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import AfterValidator, Field

from orchestrator.schema.fields import FilePath, Section, as_written, list_of, problem
from orchestrator.schema.kinds import Kind, Kinds

__all__ = ["Metrics", "SinkSpec", "sink_options"]


class SinkSpec(Kind):
    """A further place that the figures of each step are sent to."""

    module: ClassVar[str]
    """What has to be installed for it; the extra that installs it is called as the kind."""

    def missing_package(self) -> tuple[str, str] | None:
        """What is not installed that the sink needs, and what to do; ``None``: nothing."""
        if importlib.util.find_spec(self.module) is None:
            return (
                f"{self.kind} needs the package {self.module}, which is not installed",
                f"pip install 'rollout-orchestrator[{self.kind}]'",
            )
        return None


class TensorBoardSink(SinkSpec):
    """Event files for TensorBoard."""

    module = "tensorboardX"

    kind: Literal["tensorboard"] = Field(description="TensorBoard, through the package tensorboardX.")
    dir: FilePath = as_written(
        "tensorboard",
        "Directory of the event files, in a subdirectory with the run's name. Relative to the config file.",
    )


class _Named(SinkSpec):
    project: str | None = Field(None, min_length=1, description="Project; null: the name of the run.")
    name: str | None = Field(None, min_length=1, description="Name of the run in the tracker; null: run.name.")
    dir: FilePath | None = Field(
        None, description="Directory of its files; null: a directory in run.state_dir. Relative to the config file."
    )


class WandbSink(_Named):
    """Weights & Biases."""

    module = "wandb"

    kind: Literal["wandb"] = Field(description="Weights & Biases.")
    entity: str | None = Field(None, min_length=1, description="User or team; null: the default of the logged-in user.")
    mode: Literal["online", "offline"] = Field(
        "online", description="online needs a login; offline writes files for `wandb sync`."
    )
    tags: Annotated[tuple[str, ...], list_of("tags", "[curriculum]")] = Field(
        (), strict=False, description="Tags of the run."
    )


class TrackioSink(_Named):
    """trackio."""

    module = "trackio"

    kind: Literal["trackio"] = Field(description="trackio: a database in a directory.")


def _tracking_uri(value: str) -> str:
    if "://" not in value and not value.startswith("file:"):
        raise problem(
            f"{value!r} is not the URI of an MLflow store",
            'write "http://HOST:PORT", "sqlite:////data/mlflow.db" or "file:/data/mlruns"',
        )
    return value


class MlflowSink(SinkSpec):
    """MLflow."""

    module = "mlflow"

    kind: Literal["mlflow"] = Field(description="MLflow.")
    tracking_uri: Annotated[str, AfterValidator(_tracking_uri)] = Field(
        description="Tracking server (http://…), database (sqlite:////…) or directory (file:/…)."
    )
    experiment: str | None = Field(None, min_length=1, description="Experiment; null: the name of the run.")
    name: str | None = Field(None, min_length=1, description="Name of the run in the tracker; null: run.name.")

    def missing_package(self) -> tuple[str, str] | None:
        """Also where a database needs more than MLflow's client."""
        is_database = not self.tracking_uri.startswith(("http:", "https:", "file:"))
        missing = super().missing_package()
        if missing is None and is_database and importlib.util.find_spec("sqlalchemy") is None:
            return (
                "a database as tracking_uri needs the full MLflow package, but only its client is installed",
                "pip install mlflow",
            )
        return missing


SINK_KINDS: Final = Kinds(TensorBoardSink, WandbSink, MlflowSink, TrackioSink)

AnySink = Annotated[SinkSpec, SINK_KINDS]


class Metrics(Section):
    """Where the metrics of each step are written besides the log."""

    jsonl: bool = Field(True, description="Write metrics.jsonl in run.state_dir, one line a step.")
    max_bytes: Annotated[int, Field(ge=1 << 16, le=1 << 40)] = Field(
        67_108_864, description="Size in bytes at which metrics.jsonl is rotated."
    )
    keep: Annotated[int, Field(ge=0, le=1000)] = Field(3, description="How many rotated metrics.jsonl files are kept.")
    sinks: Annotated[tuple[AnySink, ...], list_of("sinks", "[{kind: tensorboard}]"), Field(max_length=16)] = Field(
        (), strict=False, description="Experiment trackers that the same metrics are sent to."
    )


def sink_options(sink: SinkSpec) -> dict[str, Any]:
    """A sink as plain values."""
    return sink.model_dump(mode="json")
