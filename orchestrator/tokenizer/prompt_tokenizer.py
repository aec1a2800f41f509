"""The run's own tokenizer, as groups call it.

Invariants:

* It never runs in the daemon's event loop, and every call has a deadline. A template that hangs costs its process.
* A call whose process ends is retried once. The tokenizer's verdict on a prompt is final.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Self

import anyio

from orchestrator.concurrency.processes import ProcessFailed, ProcessPool, ProcessTimeout, ServiceRefused
from orchestrator.concurrency.processes.messages import encode_message
from orchestrator.errors import TokenizerError
from orchestrator.records import Message

from .service import SERVICE

__all__ = ["PromptTokenizer"]

PROCESSES: Final = 2
"""Two are enough: tokenising a prompt takes a millisecond, and generating from it takes seconds."""

CALL_TIMEOUT_S: Final = 30.0
"""For one prompt; the longest that fits into a frame takes about a second."""

TRIES: Final = 2


class PromptTokenizer:
    """See the module's invariants; made by :meth:`open`."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._path = options["path"]
        self._limiter = anyio.CapacityLimiter(PROCESSES)
        self._pool = ProcessPool(SERVICE, options, timeout_s=CALL_TIMEOUT_S)

    @classmethod
    async def open(cls, path: Path, *, chat_template: str | None, add_generation_prompt: bool) -> Self:
        """Start a process, and tokenise a word to test it.

        Args:
            path: a directory with a ``tokenizer.json``, or that file.
            chat_template: Jinja text; ``None``: the tokenizer's own.
            add_generation_prompt: end a chat with the beginning of the answer.

        Raises:
            TokenizerError: it cannot be loaded.
        """
        options = {"path": str(path), "chat_template": chat_template, "add_generation_prompt": add_generation_prompt}
        tokenizer = cls(options)
        try:
            await tokenizer.tokenize("begin")
        except BaseException:
            await tokenizer.aclose()
            raise
        return tokenizer

    async def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, including the special tokens at its beginning and end.

        Raises:
            TokenizerError: the text was refused, or the processes keep failing.
        """
        return await self._ask({"text": text})

    async def tokenize_chat(self, messages: Sequence[Message], template_kwargs: dict[str, Any]) -> list[int]:
        """Token ids of chat messages rendered by the template; raises like :meth:`tokenize`."""
        return await self._ask({"messages": list(messages), "kwargs": template_kwargs})

    async def _ask(self, call: dict[str, Any]) -> list[int]:
        message, failure = encode_message(call), ""
        async with self._limiter:
            for _ in range(TRIES):
                try:
                    answer = await self._pool.call(message)
                except (ServiceRefused, ProcessTimeout) as error:
                    raise TokenizerError(f"the tokenizer at {self._path}: {error.message}") from error
                except ProcessFailed as error:
                    failure = error.message
                    continue
                if "error" in answer:
                    raise TokenizerError(answer["error"])
                return [int(token) for token in answer["tokens"]]
        raise TokenizerError(f"the tokenizer at {self._path}: {failure}")

    async def aclose(self) -> None:
        """Kill the processes."""
        await self._pool.aclose()
