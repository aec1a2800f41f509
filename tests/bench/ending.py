"""Nothing that a benchmark started outlives it, however it ended.

What a program leaves behind when it is killed becomes a child of this process, and is ended with the rest.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from contextlib import suppress
from types import FrameType
from typing import Final

from tests.bench.measure import family

PR_SET_CHILD_SUBREAPER: Final = 36
END_DEADLINE_S: Final = 10.0
END_INTERVAL_S: Final = 0.01
AGAIN_S: Final = 1.0
"""After an interrupt that nobody has seen; what was interrupted may end what it started in this time."""


def adopt() -> None:
    """Be the parent of what descends from this process and loses its own."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1):
        raise OSError(ctypes.get_errno(), "this process cannot adopt what its children leave behind")


class Interrupts:
    """SIGTERM and SIGHUP end a run as Ctrl-C does: what was started is ended, what was measured is written.

    An exception that a signal raises can be lost in a finaliser, or in a hook of ``fork``: ``came`` stays, and it is
    raised again until it is ``seen``.
    """

    def __init__(self) -> None:
        self.came = False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
            signal.signal(number, self._interrupt)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self.came = True
        signal.setitimer(signal.ITIMER_REAL, AGAIN_S)
        raise KeyboardInterrupt

    def seen(self) -> bool:
        """Whether there was an interrupt; it is not raised again."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        return self.came


def end_descendants() -> int:
    """Kill and reap all that descends from this process; returns how many lived."""
    own, end, ended = os.getpid(), time.monotonic() + END_DEADLINE_S, set()
    _reap()
    while (left := family(own) - {own}) and time.monotonic() < end:
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        ended |= left
        time.sleep(END_INTERVAL_S)
        _reap()
    return len(ended)


def _reap() -> None:
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
