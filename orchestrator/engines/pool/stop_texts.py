"""Stop texts across the seams of a response.

An engine looks for stop texts in what one request generates. A stop text that begins before a seam (the end of a chunk,
an interruption, a failure) and ends after it would be missed, and the response go on beyond its end.

Invariants:

* Pure: text in, verdict out. Only the newest ``longest - 1`` characters are kept.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["StopWatch", "cut_at_stop", "tail_tokens"]


class StopWatch:
    """Looks for stop texts in text that comes in pieces.

    Args:
        stops: without any it finds nothing, and ``looks`` for none; empty ones are not looked for.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._kept = max(map(len, self._stops), default=1) - 1
        self._tail = ""
        self.looks = bool(self._stops)

    def forget(self) -> None:
        """The response begins anew."""
        self._tail = ""

    def add(self, text: str) -> bool:
        """Whether a stop text is complete now."""
        seen = self._tail + text
        self._tail = seen[-self._kept :] if self._kept else ""
        return any(stop in seen for stop in self._stops)


def tail_tokens(stops: Sequence[str]) -> int:
    """How many of the newest tokens a watch has to be told of: a token is at least one byte of text."""
    return max(len(stop.encode()) for stop in stops)


def cut_at_stop(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop text, as engines give it."""
    return text[: min((at for stop in stops if stop and (at := text.find(stop)) >= 0), default=len(text))]
