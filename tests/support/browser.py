"""A real headless Chromium, one for all tests; each test has a context of its own."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or "/usr/bin/chromium"
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
DEADLINE_S = 20.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Tab:
    """One open page; calls wait for their end.

    ``asked`` are the addresses that the browser asked for, ``errors`` what the page's scripts raised or called errors.
    """

    def __init__(self, portal: BlockingPortal, page: Any) -> None:
        self._portal = portal
        self.page = page
        self.asked: list[str] = []
        self.errors: list[str] = []
        portal.call(self._listen)  # in the loop's own thread: listening sends the browser a message

    async def _listen(self) -> None:
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda said: self.errors.append(said.text) if said.type == "error" else None)

    def _do(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        async def run() -> Any:
            return await call(*args, **kwargs)

        return self._portal.call(run)

    def goto(self, url: str) -> None:
        self._do(self.page.goto, url, timeout=1000 * DEADLINE_S)

    def evaluate(self, script: str, argument: Any = None) -> Any:
        return self._do(self.page.evaluate, script, argument)

    def wait_for(self, script: str, argument: Any = None) -> None:
        """Until the expression, or a function of the argument, is true; looked at with every frame that is painted."""
        if not script.startswith("("):  # a bare expression would be evaluated, which the page's policy forbids
            script = f"() => {script}"
        self._do(self.page.wait_for_function, script, arg=argument, timeout=1000 * DEADLINE_S)

    def text(self, selector: str) -> str:
        return str(self._do(self.page.inner_text, selector, timeout=1000 * DEADLINE_S))

    def click(self, selector: str) -> None:
        self._do(self.page.click, selector, timeout=1000 * DEADLINE_S)

    def size(self, width: int, height: int) -> None:
        self._do(self.page.set_viewport_size, {"width": width, "height": height})

    def theme(self, scheme: str) -> None:
        self._do(self.page.emulate_media, color_scheme=scheme)

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        self._do(self.page.screenshot, path=str(path), full_page=whole)


class Browser:
    def __init__(self, portal: BlockingPortal, chromium: Any) -> None:
        self._portal = portal
        self._chromium = chromium

    @contextmanager
    def tab(self, url: str | None = None, *, width: int = 1366, height: int = 850) -> Iterator[Tab]:
        """A page in a context of its own, which ends with it."""
        context = self._portal.call(self._context, width, height)
        try:
            tab = Tab(self._portal, self._portal.call(context.new_page))
            if url is not None:
                tab.goto(url)
            yield tab
        finally:
            self._portal.call(context.close)

    async def _context(self, width: int, height: int) -> Any:
        return await self._chromium.new_context(viewport={"width": width, "height": height})


@contextmanager
def _launched() -> Iterator[Browser]:
    from playwright.async_api import async_playwright

    with tempfile.TemporaryDirectory(prefix="chromium") as home, start_blocking_portal() as portal:
        driver = portal.call(async_playwright().start)
        try:

            async def launch() -> Any:
                environment = {**os.environ, "HOME": home, "XDG_CONFIG_HOME": home, "XDG_CACHE_HOME": home}
                return await driver.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS), env=environment)

            chromium = portal.call(launch)
            try:
                yield Browser(portal, chromium)
            finally:
                portal.call(chromium.close)
        finally:
            portal.call(driver.stop)


@pytest.fixture(scope="session")
def browser_if_any() -> Iterator[Browser | None]:
    """The browser, where there is one: for tests that look at the page beside other things."""
    if not Path(CHROMIUM).exists():
        yield None
        return
    with _launched() as browser:
        yield browser


@pytest.fixture(scope="session")
def browser(browser_if_any: Browser | None) -> Browser:
    """The browser; a test that asks for it is skipped where there is none."""
    if browser_if_any is None:
        pytest.skip(f"{CHROMIUM} is missing: apt-get install chromium, or set CHROMIUM")
    return browser_if_any


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for something that no event tells of."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)
