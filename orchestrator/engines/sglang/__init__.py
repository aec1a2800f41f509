"""SGLang."""

from .engine import SGLangEngine

__all__ = ["SGLangEngine"]
