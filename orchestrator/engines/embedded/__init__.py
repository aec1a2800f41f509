"""A llama.cpp server of our own."""

from .engine import EmbeddedEngine

__all__ = ["EmbeddedEngine"]
