"""What a SGLang server streams, and what of the next event is new.

The events of a stream repeat everything so far (cumulative), or only go on (incremental), as the server was started.
Which of the two an event does is told by the server's own count of tokens.

Invariants:

* What was streamed is handed over as it arrives, up to the event that says how the generation ended.
* Tokens and their log-probabilities come from the same list, so that none can be without the other.
* What the collector of cycles would look through are lists alone: thousands of events a second are made of thousands
  of entries, none of which can be in a cycle.
* Nothing is new twice; where the server's count and its list disagree nothing is.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from orchestrator.engines.http.client import EngineHttp, TokenId
from orchestrator.engines.port import FinishReason, GenerationEnd, SamplingParams, TokenSink

__all__ = ["Event", "Finish", "Meta", "Reader", "Received"]

REASONS: Final[dict[str, FinishReason]] = {"stop": "stop", "length": "length", "abort": "abort"}


class Finish(msgspec.Struct, gc=False):
    """``type``: stop, length or abort; an abort with a ``status_code`` is an error. ``matched``: the token or text."""

    type: str
    matched: Any = None
    message: str | None = None
    status_code: int | None = None


class Entry(msgspec.Struct, array_like=True, gc=False):
    """Of one token; its text, which comes third, is not looked at."""

    logprob: float
    token: TokenId


class Meta(msgspec.Struct, gc=False):
    """``output_token_logprobs``: [log-probability, token id, text or null] of each token."""

    completion_tokens: int | None = None
    output_token_logprobs: list[Entry] = []
    finish_reason: Finish | None = None


class Problem(msgspec.Struct):
    message: str = "no message"


class Event(msgspec.Struct, gc=False):
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

    def new_tokens(self, meta: Meta) -> list[Entry]:
        """The entries that were not there before.

        Raises:
            ValueError: the server's count fits neither a repetition nor a continuation.
        """
        entries, total = meta.output_token_logprobs, meta.completion_tokens
        is_abort = meta.finish_reason is not None and meta.finish_reason.type == "abort"
        if total is None and meta.finish_reason is not None and not is_abort:
            raise ValueError("its last event has no token count")
        if total is None or (not entries and is_abort):
            total = self.tokens  # an abort while it waited: nothing was added
        if self.tokens + len(entries) == total:
            new: list[Entry] = entries
        elif len(entries) == total >= self.tokens:
            new = entries[self.tokens :]
        else:
            raise ValueError(f"an event counts {total} tokens, but {self.tokens} had arrived and it has {len(entries)}")
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


class Reader:
    """Takes the events of one stream.

    Args:
        http: the server, for errors.
        sampling: what was asked for.
        sink: where tokens go.
        end_ids: tokens that end sequences; one that did is added, because no path tells which do.
    """

    def __init__(self, http: EngineHttp, sampling: SamplingParams, sink: TokenSink, end_ids: set[int]) -> None:
        self._http = http
        self._sampling = sampling
        self._sink = sink
        self._end_ids = end_ids
        self._received = Received()
        self.end: GenerationEnd | None = None

    def take(self, event: Event) -> bool:
        """Hand over what is new; whether the generation has ended.

        Raises:
            EngineRejected, EngineUnavailable: the event is an error, or wrong.
        """
        if event.error is not None:  # a stream answers 200 before the server looks at what it was asked
            self._http.refuse(400, f"/generate: {event.error.message}")
        meta, received = event.meta_info, self._received
        try:
            new = received.new_tokens(meta)
        except ValueError as error:
            raise self._http.wrong("/generate", error) from error
        # Where the list is all there is, so is the text; in the first event both are the same. An event without tokens
        # that ends a generation which waited repeats the text in any case.
        is_cumulative = len(meta.output_token_logprobs) == received.tokens or meta.completion_tokens is None
        text = received.new_text(event.text or "", is_cumulative=is_cumulative)
        if new or text:
            self._sink([entry.token for entry in new], [entry.logprob for entry in new], text)
        if meta.finish_reason is None:
            return False
        self._note_end(meta.finish_reason)
        self.end = self._ended(meta.finish_reason)
        return True

    def _note_end(self, finish: Finish) -> None:
        token = finish.matched
        if finish.type == "stop" and type(token) is int and token not in self._sampling.stop_token_ids:
            self._end_ids.add(token)

    def _ended(self, finish: Finish) -> GenerationEnd:
        if finish.type == "abort" and finish.status_code is not None and finish.status_code >= 400:
            self._http.refuse(finish.status_code, f"/generate: {finish.message or 'no message'}")
        reason = REASONS.get(finish.type)
        if reason is None:
            raise self._http.wrong("/generate", f"unknown finish reason {finish.type!r}")
        # The beginning of a stop text may have been streamed before the server knew it for one.
        is_complete = self._received.text_is_whole and not self._sampling.stop and reason != "abort"
        return GenerationEnd(reason, text_complete=is_complete)
