"""The scripted engine."""

from .engine import ScriptedEngine, answer_of

__all__ = ["ScriptedEngine", "answer_of"]
