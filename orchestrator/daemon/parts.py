"""The components of a run in the groups in which they are built, looked at and changed.

Invariants:

* A group is a value: it holds components and does nothing. Only what supervises, reports or changes all of them is
  given a group; components know each other one by one.
"""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.archive import Archiver
from orchestrator.concurrency.loop_watch import LoopWatch
from orchestrator.consumer import Connection, Handouts
from orchestrator.consumer.starvation import Starvation
from orchestrator.consumer.waits import Waits
from orchestrator.core.filters import RewardCaps
from orchestrator.core.mixture.mixer import Mixer
from orchestrator.daemon.control.engines import EngineControl
from orchestrator.engines import EnginePool
from orchestrator.production.producers import Producers
from orchestrator.sinks import SinkFeed
from orchestrator.status import StepHistory

from .source_pipeline import SourcePipeline

__all__ = ["EngineParts", "OutputParts", "SourceParts", "TrainerParts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceParts:
    """From prompts to batches; ``pipelines`` are by source, and change with the config."""

    mixer: Mixer
    caps: RewardCaps
    pipelines: dict[str, SourcePipeline]
    producers: Producers


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineParts:
    """The engines, and what may be done to them."""

    pool: EnginePool
    control: EngineControl


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerParts:
    """Who trains on batches: who holds which, who waits, who is connected (by number of the connection)."""

    handouts: Handouts
    waits: Waits
    starvation: Starvation
    connections: dict[int, Connection]


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputParts:
    """Where figures and acknowledged groups go; without an ``archiver`` the latter are let go.

    ``loop`` watches the event loop.
    """

    loop: LoopWatch
    history: StepHistory
    archiver: Archiver | None
    feeds: list[SinkFeed]
