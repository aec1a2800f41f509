"""Settings of the tools that all tests share; helpers are in modules named for what they help with."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

from tests.support import slow
from tests.support.browser import browser, browser_if_any

__all__ = ["browser", "browser_if_any"]

# Hypothesis's own deadline of 200 ms an example measures how busy the machine is; each test has one by pytest-timeout.
# CI says whether a change is good, with the same examples for all; new ones are looked for on developers' machines.
settings.register_profile("house", deadline=None, derandomize=os.environ.get("CI") == "true")
settings.register_profile("quick", settings.get_profile("house"), max_examples=10)
settings.load_profile("house")


@pytest.fixture(scope="module", params=["asyncio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """The daemon's loop is asyncio's or uvloop's; older releases of anyio would ask for trio too."""
    return str(request.param)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """See ``tests.support.slow``."""
    slow.mark(items)
