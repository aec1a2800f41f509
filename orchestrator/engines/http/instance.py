"""What changes when a server is restarted: the start of its process, as it says in ``/metrics``.

Invariants:

* A server that does not say it when first asked is not asked again: it cannot tell.
* One that told before and fails to now is unavailable: it is not taken for another one because it is slow.
"""

from __future__ import annotations

import re
from typing import Final

from orchestrator.errors import EngineError, EngineUnavailable

from .client import EngineHttp

__all__ = ["ProcessStart"]

METRICS_DEADLINE_S: Final = 5.0
"""They are answered at once or not at all; probes have a deadline of their own."""

MAX_METRICS_BYTES: Final = 4 << 20
"""Hundreds of series with their labels fit."""

LLAMACPP_START: Final = "Process-Start-Time-Unix"
"""A header of its ``/metrics``, if it has any (``--metrics``)."""

START: Final = re.compile(rb"^process_start_time_seconds(?:\{[^}\n]{0,1000}\})? (\S{1,40})$", re.MULTILINE)


class ProcessStart:
    """See the module's docstring.

    Args:
        http: the server.
    """

    def __init__(self, http: EngineHttp) -> None:
        self._http = http
        self._can_tell: bool | None = None

    async def ask(self) -> str | None:
        """The start of the process in seconds, as the server writes it; ``None``: it cannot tell.

        Raises:
            EngineUnavailable, EngineStalled: it could tell, and does not now.
        """
        if self._can_tell is False:
            return None
        try:
            found = await self._find()
        except EngineError as error:
            if not self._can_tell and "status" in error.data:
                found = None
            else:
                why = f"it does not say when it was started: {error.message}"
                raise EngineUnavailable(self._http.name, why) from error
        if found is None and self._can_tell:
            raise EngineUnavailable(self._http.name, "it no longer says when it was started")
        self._can_tell = found is not None
        return found

    async def _find(self) -> str | None:
        answer = await self._http.fetch("/metrics", deadline_s=METRICS_DEADLINE_S, max_bytes=MAX_METRICS_BYTES)
        found = START.search(answer.body)
        if found is not None:
            return found[1].decode("ascii", "replace")
        return answer.headers.get(LLAMACPP_START)
