"""Inference engines: the port, its adapters, and the pool that makes one of many."""

from .build import build_engine
from .pool import EnginePool, EngineStatistics
from .port import Engine, EngineInfo, GenerationEnd, GenerationRequest, SamplingParams, TokenSink
from .scripted import ScriptedEngine

__all__ = [
    "Engine",
    "EngineInfo",
    "EnginePool",
    "EngineStatistics",
    "GenerationEnd",
    "GenerationRequest",
    "SamplingParams",
    "ScriptedEngine",
    "TokenSink",
    "build_engine",
]
