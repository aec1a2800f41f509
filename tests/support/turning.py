"""Waiting in a test for something that is nobody's event: the loop turns until it is so, or a deadline passes."""

from __future__ import annotations

from collections.abc import Callable

import anyio

DEADLINE_S = 20.0
"""Only a test that hangs meets it."""


async def turned(condition: Callable[[], object]) -> None:
    """Return once ``condition`` holds; ``TimeoutError`` if it does not within :data:`DEADLINE_S`."""
    with anyio.fail_after(DEADLINE_S):
        while not condition():  # noqa: ASYNC110 - a count in a component has no event
            await anyio.sleep(0.001)
