"""The page, health, status and metrics over HTTP, for people, probes and Prometheus.

Invariants:

* Read only: nothing here changes the run. No page refers to another host, and browsers are told to contact none.
* ``/-/healthy`` answers while the event loop runs; ``/-/ready`` when at least one engine is available.
* At a loopback address, only requests for ``localhost``, an IP address or the configured name are answered. Any other
  name means that a foreign page reaches us through a browser on this machine (DNS rebinding).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable
from typing import Any, Final

import anyio
import orjson
from aiohttp import web
from anyio.abc import TaskStatus

from orchestrator.errors import StateError

from .assets import HEADERS, read_assets
from .history import StepHistory
from .metrics import render_metrics
from .samples import SampleReader, Samples
from .source_cause import AVAILABLE
from .stream import Streams

__all__ = ["StatusServer"]

STOP_DEADLINE_S: Final = 2.0
"""For responses still being sent when the daemon stops."""


class StatusServer:
    """See the module's invariants.

    Args:
        address: ``host:port``.
        status: everything that ``orchestrator status --json`` prints.
        history: the figures of the steps.
        samples: reads the archive; ``None``: there is none.
    """

    def __init__(
        self,
        address: str,
        status: Callable[[], Awaitable[dict[str, Any]]],
        history: StepHistory,
        samples: SampleReader | None = None,
    ) -> None:
        host, _, port = address.rpartition(":")
        self._host = host.strip("[]")
        self._port = int(port)
        self._status = status
        self._history = history
        self._streams = Streams(status, history)
        self._samples = Samples(samples)

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """Serve until cancelled.

        Raises:
            StateError: the address cannot be listened on.
        """
        app = web.Application(middlewares=[self._guard])
        for path, asset in (await read_assets()).items():
            app.router.add_get(path, asset)
        app.router.add_get("/events", self._streams.serve)
        app.router.add_get("/-/healthy", self._healthy)
        app.router.add_get("/-/ready", self._ready)
        app.router.add_get("/status", self._report)
        app.router.add_get(r"/samples/{step:\d{1,18}}", self._samples.serve)
        app.router.add_get("/metrics", self._metrics)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=STOP_DEADLINE_S / 2)
        await runner.setup()
        try:
            await web.TCPSite(runner, self._host, self._port).start()
            task_status.started()
            await anyio.sleep_forever()
        except OSError as error:
            raise StateError(
                f"cannot listen on {self._host}:{self._port}: {error.strerror or error}; change status.http, or set it"
                " to null"
            ) from error
        finally:
            with anyio.CancelScope(shield=True), anyio.move_on_after(STOP_DEADLINE_S):
                self._streams.close()
                await runner.cleanup()

    @web.middleware
    async def _guard(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        if not self._may_be_called(request.host):
            text = f"this address answers only to localhost and to IP addresses, not to {request.host[:80]!r}\n"
            return web.Response(status=421, text=text, headers=HEADERS)
        try:
            response = await handler(request)
        except web.HTTPException as refusal:
            refusal.headers.update(HEADERS)
            raise
        if not response.prepared:
            response.headers.update(HEADERS)
        return response

    def _may_be_called(self, host: str) -> bool:
        """Whether the ``Host`` of a request is acceptable; off loopback, any is."""
        name = _without_port(host)
        return not _is_loopback(self._host) or name in ("localhost", self._host.lower()) or _is_address(name)

    async def _healthy(self, _: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _ready(self, _: web.Request) -> web.Response:
        engines = (await self._status())["engines"]
        if any(engine["state"] in AVAILABLE for engine in engines):
            return web.Response(text="ready\n")
        states = ", ".join(f"{engine['name']} is {engine['state']}" for engine in engines) or "there are none"
        return web.Response(status=503, text=f"no engine is available: {states}\n")

    async def _report(self, _: web.Request) -> web.Response:
        return web.Response(body=orjson.dumps(await self._status()), content_type="application/json")

    async def _metrics(self, _: web.Request) -> web.Response:
        status = (await self._status()) | {"history": self._history.last(1)}
        return web.Response(
            body=render_metrics(status), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        )


def _without_port(host: str) -> str:
    """``localhost:8642`` and ``[::1]:8642`` without their ports and brackets, in lower case."""
    name = host.partition("]")[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0]
    return name.lower().rstrip(".")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_loopback(host: str) -> bool:
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)
