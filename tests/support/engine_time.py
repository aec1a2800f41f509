"""An event loop whose clock jumps: waits cost nothing, and their order is exact.

Where nothing is ready, the clock moves on to the next timer at once. For tests without sockets, files and threads.
Whoever waits for something has to wait for it, or to sleep: while a task is ready time stands still.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Mapping
from typing import Any

LONGEST_MOMENT = 1_000_000
"""Rounds of the loop; a test that makes so many at one moment waits by asking again and again."""


class _JumpingSelector(selectors.DefaultSelector):
    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self._rounds = 0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise RuntimeError("every task waits for something that nobody will do")
        self._rounds = 0 if timeout > 0 else self._rounds + 1
        if self._rounds > LONGEST_MOMENT:
            raise RuntimeError("time stands still: some task is always ready")
        self.now += max(0.0, timeout)
        return super().select(0)


class JumpingLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now


JUMPING: Mapping[str, Any] = {"loop_factory": JumpingLoop}
"""Options of anyio's asyncio backend."""
