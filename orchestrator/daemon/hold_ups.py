"""What the log says when the event loop is held up.

Invariants:

* Called in the thread of the loop's watch: it logs and does nothing else.
"""

from __future__ import annotations

from structlog.typing import FilteringBoundLogger

from orchestrator.concurrency.loop_watch import HoldUp

__all__ = ["log_hold_up"]


def log_hold_up(log: FilteringBoundLogger, hold_up: HoldUp) -> None:
    """Say whose code holds the loop, and what to do about it; with the stack where it seems not to let go."""
    whose = f"asynchronous {hold_up.culprit}" if hold_up.is_foreign else hold_up.culprit
    advice = " (make it a plain function: these run in processes of their own)" if hold_up.is_foreign else ""
    if hold_up.stack is None:
        log.warning(
            f"the event loop has been held up for {hold_up.seconds:.1f} s by {whose}{advice}; everything waits",
            action="loop_held_up",
        )
    else:
        log.error(
            f"the event loop is stuck: {whose} has held it for {hold_up.seconds:.0f} s{advice}; its stack:\n"
            f"{hold_up.stack}",
            action="loop_stuck",
        )
