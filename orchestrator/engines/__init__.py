"""Inference engines: the port, its adapters, and the pool that makes one of many."""

from orchestrator.engines.pool.parameter_update import EngineUpdate, UpdateMode
from orchestrator.engines.pool.pool import EnginePool, EngineStatistics, KnownWeights
from orchestrator.engines.pool.roster import PROBE_TEXT

from .build import build_engine
from .port import Engine, EngineInfo, GenerationEnd, GenerationRequest, SamplingParams, TokenSink, WeightUpdate
from .scripted import ScriptedEngine

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
