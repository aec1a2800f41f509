"""Watches the event loop from a thread: how long it has been held up, and by whose code.

Invariants:

* The thread reads and never waits for the loop; it works while the loop is blocked, which is when it is needed.
* A hold-up is counted and reported when it exceeds ``LATE_S``, and reported once more, with the stack, when it exceeds
  ``STUCK_S``.
* What foreign code is on the loop's stack is named by :func:`~orchestrator.concurrency.foreign.foreign_name`; else the
  innermost frame of ours.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Final

import anyio
from anyio.abc import TaskStatus

from .foreign import foreign_name

__all__ = ["BEAT_S", "LATE_S", "STUCK_S", "HoldUp", "LoopStatistics", "LoopWatch"]

BEAT_S: Final = 0.1
"""The loop says that often that it turns: ten wake-ups a second cost under a thousandth of a core."""

LATE_S: Final = 0.5
"""A hold-up that people notice: a status that takes half a second."""

LOOPS: Final = frozenset({"orchestrator.concurrency.main_loop", "asyncio.runners", "asyncio.base_events", "selectors"})
"""Where a loop waits for something to do: with one of these innermost, no code of anybody's holds it up."""

STUCK_S: Final = 60.0
"""Code that holds the loop that long does not mean to let go; its stack is worth a line."""


@dataclass(frozen=True, slots=True)
class HoldUp:
    """The loop does not turn.

    Attributes:
        seconds: for how long, so far.
        culprit: whose code is at work: a reward's name, or file, line and function.
        is_foreign: whether that is code of the user's.
        stack: the loop's stack as text, where it is stuck; else ``None``.
    """

    seconds: float
    culprit: str
    is_foreign: bool
    stack: str | None = None


@dataclass(frozen=True, slots=True)
class LoopStatistics:
    """Counts since the start.

    Attributes:
        hold_ups: how often the loop was held up for longer than ``LATE_S``.
        longest_s: the longest of them, to a tenth of a second.
        last_culprit: whose code the last of them was; ``None``: there was none.
        last_ago_s: seconds since the last of them was last seen; ``None``: there was none.
    """

    hold_ups: int
    longest_s: float
    last_culprit: str | None
    last_ago_s: float | None


class LoopWatch:
    """See the module's invariants.

    Args:
        report: called **in the thread** for each report; must not block, and what it raises ends nothing.
    """

    def __init__(self, report: Callable[[HoldUp], None]) -> None:
        self._report = report
        self._beat = time.monotonic()
        self._lock = threading.Lock()
        self._hold_ups, self._longest_s = 0, 0.0
        self._last: tuple[str, float] | None = None

    def statistics(self) -> LoopStatistics:
        """Counts since the start."""
        with self._lock:
            last = self._last
            ago = None if last is None else round(time.monotonic() - last[1], 3)
            longest = round(self._longest_s, 3)
            return LoopStatistics(self._hold_ups, longest, None if last is None else last[0], ago)

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """Watch the loop that runs this; until cancelled."""
        ended = threading.Event()
        self._beat = time.monotonic()
        thread = threading.Thread(
            target=self._watch, args=(threading.get_ident(), ended), name="loop watch", daemon=True
        )
        thread.start()
        try:
            task_status.started()
            while True:
                self._beat = time.monotonic()
                await anyio.sleep(BEAT_S)
        finally:
            ended.set()

    # -- the thread ----------------------------------------------------------------------------------------------------

    def _watch(self, loop_thread: int, ended: threading.Event) -> None:
        late: HoldUp | None = None
        beat = self._beat
        while not ended.wait(BEAT_S):
            if late is None or self._beat != beat:
                late, beat = None, self._beat
            held_s = time.monotonic() - beat - BEAT_S
            if late is None and held_s > LATE_S:
                late = self._look(loop_thread, held_s, with_stack=False)
                self._count(late)
                self._say(late)
            elif late is not None:
                self._goes_on(held_s)
                if late.stack is None and held_s > STUCK_S:
                    late = self._look(loop_thread, held_s, with_stack=True)
                    self._say(late)

    def _count(self, hold_up: HoldUp) -> None:
        with self._lock:
            self._hold_ups += 1
            self._longest_s = max(self._longest_s, hold_up.seconds)
            self._last = hold_up.culprit, time.monotonic()

    def _goes_on(self, seconds: float) -> None:
        with self._lock:
            self._longest_s = max(self._longest_s, seconds)
            if self._last is not None:
                self._last = self._last[0], time.monotonic()

    def _look(self, loop_thread: int, seconds: float, *, with_stack: bool) -> HoldUp:
        frame = sys._current_frames().get(loop_thread)
        name = foreign_name(frame)
        stack = "".join(traceback.format_stack(frame)) if with_stack and frame is not None else None
        return HoldUp(seconds, name or _where(frame), name is not None, stack)

    def _say(self, hold_up: HoldUp) -> None:
        try:
            self._report(hold_up)
        except Exception:  # noqa: BLE001 - a log that fails must not end the watch; there is nobody to tell
            return


def _where(frame: FrameType | None) -> str:
    if frame is None:
        return "unknown code"
    if frame.f_globals.get("__name__") in LOOPS:
        return "nothing in it: the machine gives the process no time"
    return f"{frame.f_code.co_filename}:{frame.f_lineno} ({frame.f_code.co_name})"
