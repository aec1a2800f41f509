"""Waiting for the disk before an answer, for as long as an answer may take.

Invariants:

* Nothing is answered with a result before what it reports is written. Where the disk takes too long the answer is
  ``not_written``: it says what is in force already, and that it is not certain to outlive the daemon.
"""

from __future__ import annotations

from typing import Any, Final

import anyio

from orchestrator.core.ledger.journal import Journal
from orchestrator.errors import NotWritten

__all__ = ["WRITE_DEADLINE_S", "kept"]

WRITE_DEADLINE_S: Final = 20.0
"""Below the 30 s for which clients wait beyond a request's own time, so that they hear more than silence."""


async def kept(journal: Journal, what: str, *, data: dict[str, Any] | None = None) -> None:
    """Return when everything recorded so far is written.

    Args:
        journal: where it was recorded.
        what: a clause that says what is in force.
        data: what the answer would have been.

    Raises:
        NotWritten: the disk takes too long; ``data`` is that of the error.
    """
    with anyio.move_on_after(WRITE_DEADLINE_S):
        await journal.written()
        return
    raise NotWritten(
        f"{what}, but was not written to disk within {WRITE_DEADLINE_S:g} s; a crash now would undo"
        " it. See status.state.fault",
        data=data,
    )
