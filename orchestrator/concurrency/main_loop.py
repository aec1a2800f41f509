"""The loop of a daemon's whole life, which foreign tasks cannot keep alive.

Invariants:

* What ``main`` raises leaves :func:`run_main` as it is.
* All other tasks are cancelled at the end. Those that ignore it are left behind: the loop is not closed then, because
  closing it would wait for them for ever.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import uvloop

from .foreign import unfinished_tasks

__all__ = ["run_main"]


def run_main(main: Callable[[], Coroutine[Any, Any, None]], left_behind: Callable[[list[str]], None]) -> None:
    """Run ``main`` on a loop of its own, as ``anyio.run`` does.

    Args:
        main: what to run.
        left_behind: called with the names of the tasks that ignored their cancellation, if there are any.
    """
    loop = uvloop.new_event_loop()
    rest: list[str] = []
    try:
        asyncio.set_event_loop(loop)
        try:
            loop.run_until_complete(main())
        finally:
            rest = loop.run_until_complete(unfinished_tasks())
            if not rest:
                loop.run_until_complete(loop.shutdown_asyncgens())
                loop.run_until_complete(loop.shutdown_default_executor())
    finally:
        asyncio.set_event_loop(None)
        if rest:
            loop.set_exception_handler(lambda *_: None)  # they are destroyed with the process, which is meant
            left_behind(rest)
        else:
            loop.close()
