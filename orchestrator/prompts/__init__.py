"""Prompt sources: rows of a file, in an order that is a function of the seed.

:func:`open_prompts` is the way in; ``port.py`` says what the rest of the house knows of a source.
"""

from .files import load_prompts, open_prompts
from .port import PromptSource

__all__ = ["PromptSource", "load_prompts", "open_prompts"]
