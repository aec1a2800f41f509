"""Aborting a generation of a SGLang server by its id.

Invariants:

* It is told once at most, also when cancelled, within ``ABORT_DEADLINE_S``.
* Closing the connection alone is noticed late, and brings nothing of what was generated and not sent yet.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Final

import anyio

from orchestrator.engines.http.client import EngineHttp
from orchestrator.errors import EngineError

__all__ = ["ABORT_DEADLINE_S", "Abort"]

ABORT_DEADLINE_S: Final = 1.0
"""An abort is answered at once or not at all; the slot of the request is held for so long."""


class Abort:
    """The abort of one generation.

    Args:
        http: the server.
        rid: the id under which it was asked for.
    """

    def __init__(self, http: EngineHttp, rid: str) -> None:
        self._http = http
        self.rid = rid
        self._is_told = False

    async def tell(self) -> None:
        """Tell the server; one that is gone runs nothing that could be aborted."""
        if self._is_told:
            return
        self._is_told = True
        with anyio.CancelScope(shield=True), suppress(EngineError):
            await self._http.ask_raw("/abort_request", {"rid": self.rid}, deadline_s=ABORT_DEADLINE_S)
