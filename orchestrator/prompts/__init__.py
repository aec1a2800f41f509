"""Prompt sources: rows of a file or entries of a task, in an order that is a function of the seed.

``port.py`` says what the rest of the daemon knows of a source, ``kinds.py`` lists the kinds. This module imports the
port alone: the worker processes of a kind import it too, and need no models of the config.
"""

from .port import PromptSource

__all__ = ["PromptSource"]
