"""vLLM and other OpenAI-compatible servers."""

from .engine import OpenAIEngine

__all__ = ["OpenAIEngine"]
