"""What is used of the answers of an OpenAI-compatible server, and of vLLM's own paths.

Invariants:

* Token ids are checked where they come in: they fit into the 4 bytes that samples hold them in.
"""

from __future__ import annotations

from typing import Any

import msgspec

from .http import TokenId

__all__ = [
    "Choice",
    "Completion",
    "Event",
    "Logprobs",
    "Model",
    "Models",
    "Problem",
    "Prompt",
    "Props",
    "Tokens",
    "Version",
]


class Version(msgspec.Struct):
    """vLLM's ``/version``."""

    version: str


class Props(msgspec.Struct):
    """llama.cpp's ``/props``."""

    default_generation_settings: dict[str, Any]


class Model(msgspec.Struct):
    """One of ``/v1/models``; ``max_model_len`` bounds prompt and response together."""

    id: str
    max_model_len: int | None = None


class Models(msgspec.Struct):
    """``/v1/models``."""

    data: list[Model]


class Logprobs(msgspec.Struct):
    """Of the drawn tokens, one each."""

    token_logprobs: list[float | None] = []


class Choice(msgspec.Struct):
    """A completion, or what an event adds to it."""

    text: str = ""
    token_ids: list[TokenId] | None = None
    logprobs: Logprobs | None = None
    finish_reason: str | None = None


class Completion(msgspec.Struct):
    """An answer without a stream."""

    choices: list[Choice]


class Problem(msgspec.Struct):
    """The error that a stream ends with; ``code`` is a status, or a word."""

    message: str = "no message"
    code: int | str | None = None


class Event(msgspec.Struct):
    """An event of a stream."""

    choices: list[Choice] = []
    error: Problem | None = None


class Tokens(msgspec.Struct):
    """vLLM's ``/tokenize``."""

    tokens: list[TokenId]
    token_strs: list[str] | None = None


class Prompt(msgspec.Struct):
    """vLLM's ``/detokenize``."""

    prompt: str
