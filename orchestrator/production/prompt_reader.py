"""A prompt as its group needs it: read, and turned into the token ids or the chat that engines are asked with.

Invariants:

* A prompt is a function of its row and of how the run tokenises: read again after a restart it is the same.
* An engine's fault delays tokenising and does not fail it (``any_engine``); what fails here is the prompt's own fault,
  and costs its group alone.
"""

from __future__ import annotations

from array import array
from typing import Any, NamedTuple

from orchestrator.engines import EnginePool
from orchestrator.errors import EngineRejected, OrchestratorError, TokenizerError
from orchestrator.prompts import PromptSource
from orchestrator.records import Message, Prompt
from orchestrator.tokenizer import PromptTokenizer

__all__ = ["PromptReader", "PromptRefused", "ReadPrompt"]


class PromptRefused(OrchestratorError, ValueError):
    """Neither the tokenizer nor an engine takes this prompt; the message says why."""

    code = "prompt_refused"


class ReadPrompt(NamedTuple):
    """``tokens`` [P] are its token ids; empty where engines give text alone, which are asked with ``messages``."""

    prompt: Prompt
    tokens: array[int]
    messages: list[Message] | None


class PromptReader:
    """Reads the prompts of one source; see the module's invariants.

    Args:
        prompts: the source's prompts.
        pool: the engines, which tokenise where there is no tokenizer.
        template_kwargs: for the chat template.
        tokenizer: the run's own; ``None``: the engines'.
    """

    def __init__(
        self,
        prompts: PromptSource,
        pool: EnginePool,
        *,
        template_kwargs: dict[str, Any] | None = None,
        tokenizer: PromptTokenizer | None = None,
    ) -> None:
        self._prompts = prompts
        self._pool = pool
        self._template_kwargs = template_kwargs or {}
        self._text: EnginePool | PromptTokenizer = tokenizer or pool

    async def read(self, prompt_index: int, epoch: int) -> ReadPrompt:
        """The prompt of that row.

        Raises:
            PromptUnavailable: it cannot be had.
            PromptRefused: it cannot be turned into what the engines take.
            PromptFileError: the row cannot be read any more.
        """
        prompt = await self._prompts.read(prompt_index, epoch)
        if await self._pool.is_text_only():
            messages = _messages_of(prompt)
            if messages is None:
                raise PromptRefused("its prompt is token ids, but the engines accept only text")
            return ReadPrompt(prompt, array("i"), messages)
        try:
            return ReadPrompt(prompt, array("i", await self._tokenize(prompt)), None)
        except (EngineRejected, TokenizerError) as error:
            raise PromptRefused(f"its prompt was rejected: {error}") from error

    async def _tokenize(self, prompt: Prompt) -> Any:
        if prompt.tokens is not None:
            return prompt.tokens
        if isinstance(prompt.content, list):
            return await self._text.tokenize_chat(prompt.content, self._template_kwargs)
        return await self._text.tokenize(prompt.content or "")


def _messages_of(prompt: Prompt) -> list[Message] | None:
    """The prompt as a chat; a text is one message of the user. ``None``: it is token ids alone."""
    content = prompt.content
    return [{"role": "user", "content": content}] if isinstance(content, str) else content
