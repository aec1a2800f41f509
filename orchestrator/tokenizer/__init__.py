"""Prompts to token ids in the daemon's own worker processes, by a tokenizer and a chat template on the disk.

For engines that have no endpoint for it, and for prompts that must not cost an engine's time. Engines that are reached
over HTTP usually tokenise themselves; a config without ``tokenizer`` leaves it to them.
"""

from .files import find_problem
from .prompt_tokenizer import PromptTokenizer

__all__ = ["PromptTokenizer", "find_problem"]
