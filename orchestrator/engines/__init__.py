"""Inference engines: the port, its adapters, and the pool that makes one of many."""

from .build import build_engine
from .pool import EnginePool, EngineStatistics, KnownWeights
from .port import (
    Engine,
    EngineInfo,
    GenerationEnd,
    GenerationRequest,
    SamplingParams,
    TokenSink,
    WeightUpdate,
)
from .roster import PROBE_TEXT
from .scripted import ScriptedEngine
from .weight_update import EngineUpdate, UpdateMode

__all__ = [
    "PROBE_TEXT",
    "Engine",
    "EngineInfo",
    "EnginePool",
    "EngineStatistics",
    "EngineUpdate",
    "GenerationEnd",
    "GenerationRequest",
    "KnownWeights",
    "SamplingParams",
    "ScriptedEngine",
    "TokenSink",
    "UpdateMode",
    "WeightUpdate",
    "build_engine",
]
