"""What wrong answers of an inference server become.

Invariants:

* A 4xx answer is ``EngineRejected``, except those that ask to come again later (408, 425, 429); everything else that is
  not the answer asked for is ``EngineUnavailable``.
* ``data`` of an error holds the ``status`` of a request that was refused before it began, or the ``event_status`` of a
  stream that the server itself ended with an error.
"""

from __future__ import annotations

import ssl
from typing import Final, Literal

import aiohttp
import orjson

from orchestrator.errors import EngineError, EngineRejected, EngineUnavailable

__all__ = ["Failures", "redirected_to", "said"]

COME_AGAIN: Final = frozenset({408, 425, 429})
"""4xx answers that do not speak of what was asked for, but of when."""

MAX_WORDS: Final = 300
"""Of a text that is no message in any known form."""


class Failures:
    """Makes the errors of one server.

    Args:
        name: of the engine.
        kind: of server, as in "a SGLang server".
    """

    __slots__ = ("_kind", "_name")

    def __init__(self, name: str, kind: str) -> None:
        self._name = name
        self._kind = kind

    def of_status(self, status: int, message: str, key: Literal["status", "event_status"]) -> EngineError:
        """Of an answer, or an event, that names a status."""
        kind = EngineRejected if 400 <= status < 500 and status not in COME_AGAIN else EngineUnavailable
        return kind(self._name, f"{status}: {message}", data={key: status})

    def of_answer(self, path: str, status: int, text: bytes) -> EngineError:
        """Of a refusal with its text."""
        return self.of_status(status, f"{path}: {_message_of(text.decode('utf-8', 'replace'))}", "status")

    def unavailable(self, message: str) -> EngineUnavailable:
        """Of anything else that went wrong."""
        return EngineUnavailable(self._name, message)

    def wrong(self, path: str, problem: object) -> EngineUnavailable:
        """Of an answer that cannot be one."""
        return EngineUnavailable(self._name, f"{path}: not an answer of a {self._kind}: {problem}")


def redirected_to(location: str) -> bytes:
    """The text of a redirection. None is followed: the key would go along to a server that nobody named."""
    return f"it redirects to {location}: use the url of that server".encode()


def said(error: Exception) -> str:
    """What went wrong with a connection, in words of ours: those of the libraries name their own parts."""
    reason = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    detail = getattr(reason, "strerror", None) or str(reason).partition("[")[0] or type(reason).__name__
    if isinstance(reason, ssl.SSLCertVerificationError):
        detail = f"its certificate was not accepted: {reason.verify_message}"
    if isinstance(error, aiohttp.ClientConnectorError):
        return f"cannot connect: {detail}"
    if isinstance(error, aiohttp.ClientPayloadError):
        return "the connection ended in the middle of the answer"
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return "the server disconnected without an answer"
    return str(detail)


def _message_of(text: str) -> str:
    """The message of an error answer, in any of the forms that servers give it."""
    try:
        answer = orjson.loads(text)
    except orjson.JSONDecodeError:
        return text.strip()[:MAX_WORDS] or "no message"
    if isinstance(answer, dict):
        error = answer.get("error", answer)
        found = error.get("message", error.get("detail")) if isinstance(error, dict) else error
        if found:
            return str(found)
    return text.strip()[:MAX_WORDS] or "no message"
