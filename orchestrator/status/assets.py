"""The files of the page, served as they are in ``page/``: nothing is built and nothing is fetched.

Invariants:

* The files are those of :data:`FILES`; no path of a request ever reaches the file system.
* They are read once, before the server listens.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import anyio
from aiohttp import web

__all__ = ["FILES", "HEADERS", "read_assets"]

FOLDER: Final = Path(__file__).parent / "page"

FILES: Final = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/charts.js": ("charts.js", "text/javascript"),
    "/tables.js": ("tables.js", "text/javascript"),
    "/words.js": ("words.js", "text/javascript"),
    "/uplot/uPlot.iife.min.js": ("uplot/uPlot.iife.min.js", "text/javascript"),
    "/uplot/uPlot.min.css": ("uplot/uPlot.min.css", "text/css"),
    "/uplot/LICENSE": ("uplot/LICENSE", "text/plain"),
}
"""By the path of the request."""

HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:;"
        " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
"""Headers of every response: the page may load only what this server has."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


async def read_assets() -> dict[str, Handler]:
    """A handler for each path."""
    return {path: _handler(await anyio.Path(FOLDER / file).read_bytes(), kind) for path, (file, kind) in FILES.items()}


def _handler(body: bytes, kind: str) -> Handler:
    async def serve(_: web.Request) -> web.Response:
        return web.Response(body=body, content_type=kind, charset="utf-8")

    return serve
