"""What the ways to load new parameters share: a server that was paused goes on, however the rest ended.

Invariants:

* The server is told so after success, failure and cancellation alike, shielded from cancellation, within a deadline.
* A server that could not be told may still be paused: what then is raised says so, unless we were cancelled.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import anyio

from orchestrator.errors import EngineError, EngineRejected, EngineUnavailable

from .client import EngineHttp

__all__ = ["CANNOT_LOAD", "NO_SUCH_PATH", "PAUSE_DEADLINE_S", "resumed"]

CANNOT_LOAD: Final = (
    "its server cannot load new parameters: start one with them at the same address, then call set_policy_version"
    " once it is ready"
)

NO_SUCH_PATH: Final = frozenset({404, 405})
"""What servers answer that do not know a path."""

PAUSE_DEADLINE_S: Final = 60.0
"""A pause waits for the step that is being computed, and for the aborts of all requests."""

RESUME_DEADLINE_S: Final = 10.0
"""Waited for even when cancelled, so short; well above what a server needs that answers at all."""


@asynccontextmanager
async def resumed(http: EngineHttp, path: str) -> AsyncIterator[None]:
    """Have the server go on after the body, by a POST to ``path``.

    Raises:
        EngineUnavailable: it could not be told to.
    """
    try:
        yield
    except EngineError as error:
        await _resume(http, path, after=error)
        raise
    except BaseException:
        with anyio.CancelScope(shield=True):
            await _try_to_resume(http, path)
        raise
    await _resume(http, path, after=None)


async def _resume(http: EngineHttp, path: str, *, after: EngineError | None) -> None:
    with anyio.CancelScope(shield=True):
        problem = await _try_to_resume(http, path)
    if problem is not None:
        before = f"; the error before that: {after.message}" if after is not None else ""
        raise EngineUnavailable(http.name, f"it may still be paused: {problem.message}{before}") from problem


async def _try_to_resume(http: EngineHttp, path: str) -> EngineError | None:
    """The caller shields."""
    try:
        await http.ask_raw(path, {}, deadline_s=RESUME_DEADLINE_S)
    except EngineRejected as error:
        return None if error.data.get("status") in NO_SUCH_PATH else error  # it cannot be paused either
    except EngineError as error:
        return error
    return None
