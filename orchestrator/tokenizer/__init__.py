"""Turns prompts into token ids in the daemon's own processes, with a tokenizer and a chat template on disk.

For engines that have no endpoint for it, and to save the engines' time. Most engines that are reached over HTTP
tokenise prompts themselves; a config without ``tokenizer`` leaves it to them.
"""

from .files import find_problem
from .prompt_tokenizer import PromptTokenizer

__all__ = ["PromptTokenizer", "find_problem"]
