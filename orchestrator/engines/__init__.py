"""Inference engines: the port, its adapters, and the pool that makes one of many."""

from orchestrator.engines.pool.generation_context import TurnEnd, TurnRequest
from orchestrator.engines.pool.parameter_update import EngineUpdate, UpdateMode
from orchestrator.engines.pool.pool import EnginePool, EngineStatistics, KnownParameters, PoolSettings
from orchestrator.engines.pool.roster import PROBE_TEXT

from .port import Engine, EngineInfo, GenerationEnd, GenerationRequest, ParameterUpdate, SamplingParams, TokenSink
from .scripted.engine import ScriptedEngine

__all__ = [
    "PROBE_TEXT",
    "Engine",
    "EngineInfo",
    "EnginePool",
    "EngineStatistics",
    "EngineUpdate",
    "GenerationEnd",
    "GenerationRequest",
    "KnownParameters",
    "ParameterUpdate",
    "PoolSettings",
    "SamplingParams",
    "ScriptedEngine",
    "TokenSink",
    "TurnEnd",
    "TurnRequest",
    "UpdateMode",
]
