"""Settings of the tools that all tests share; helpers are in modules named for what they help with."""

from __future__ import annotations

from hypothesis import settings

from .browser import browser, browser_if_any

__all__ = ["browser", "browser_if_any"]

# Hypothesis's own deadline of 200 ms an example measures how busy the machine is; each test has one by pytest-timeout.
settings.register_profile("house", deadline=None)
settings.load_profile("house")
