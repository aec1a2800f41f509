"""llama.cpp servers."""

from .engine import LlamaCppEngine

__all__ = ["LlamaCppEngine"]
