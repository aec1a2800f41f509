"""What a SGLang server streams, and what of the next event is new.

The events of a stream repeat everything so far (cumulative), or only go on (incremental), as the server was started.
Which of the two an event does is told by the server's own count of tokens.

Invariants:

* Tokens and their log-probabilities come from the same list, so that none can be without the other.
* Nothing is new twice; where the server's count and its list disagree nothing is.
"""

from __future__ import annotations

from typing import Any

import msgspec

from .http import TokenId

__all__ = ["Event", "Finish", "Meta", "Received"]


class Finish(msgspec.Struct):
    """``type``: stop, length or abort; an abort with a ``status_code`` is an error. ``matched``: the token or text."""

    type: str
    matched: Any = None
    message: str | None = None
    status_code: int | None = None


class Meta(msgspec.Struct):
    """``output_token_logprobs``: [log-probability, token id, text or null] of each token."""

    completion_tokens: int | None = None
    output_token_logprobs: list[tuple[float, TokenId, str | None]] = []
    finish_reason: Finish | None = None


class Problem(msgspec.Struct):
    message: str = "no message"


class Event(msgspec.Struct):
    """An event; ``error``: what a server says that looked at the request after it had answered 200."""

    text: str | None = None
    meta_info: Meta = msgspec.field(default_factory=Meta)
    error: Problem | None = None


class Received:
    """What came of a stream, and what of the next event is new."""

    def __init__(self) -> None:
        self.tokens = 0
        self.characters = 0
        self.text_is_whole = True

    def new_tokens(self, meta: Meta) -> list[tuple[float, int, str | None]]:
        """The entries that were not there before.

        Raises:
            ValueError: the server's count fits neither a repetition nor a continuation.
        """
        entries, total = meta.output_token_logprobs, meta.completion_tokens
        is_abort = meta.finish_reason is not None and meta.finish_reason.type == "abort"
        if total is None and meta.finish_reason is not None and not is_abort:
            raise ValueError("its last event does not count the tokens")
        if total is None or (not entries and is_abort):
            total = self.tokens  # an abort while it waited: nothing was added
        if self.tokens + len(entries) == total:
            new: list[tuple[float, int, str | None]] = entries
        elif len(entries) == total >= self.tokens:
            new = entries[self.tokens :]
        else:
            raise ValueError(f"{total} tokens were counted, {self.tokens} had come, and {len(entries)} came with it")
        self.tokens += len(new)
        return new

    def new_text(self, text: str, *, is_cumulative: bool) -> str:
        """The characters that were not there before. What the server takes back cannot be taken back here."""
        if not is_cumulative:
            self.characters += len(text)
            return text
        self.text_is_whole = self.text_is_whole and len(text) >= self.characters
        new = text[self.characters :]
        self.characters = max(self.characters, len(text))
        return new
