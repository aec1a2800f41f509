"""Where a server is, and what every request to it begins with: names of hosts, keys, redirects."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import anyio
import pytest
from aiohttp import web
from pydantic import TypeAdapter, ValidationError

from orchestrator.engines.http.client import EngineHttp
from orchestrator.engines.http.origin import Origin
from orchestrator.errors import EngineUnavailable
from orchestrator.schema.fields import ServerUrl

LONG = "a" * 63
URL = TypeAdapter(ServerUrl)


@asynccontextmanager
async def server(answer: web.Response) -> AsyncIterator[tuple[str, list[web.Request]]]:
    """Its url, and what it was asked; every path has the same answer."""
    asked: list[web.Request] = []

    async def handle(request: web.Request) -> web.Response:
        asked.append(request)
        return answer

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handle)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}", asked
    finally:
        await runner.cleanup()


def head_of(url: str) -> bytes:
    return Origin(url, {}, connect_timeout_s=1.0, keeps=False).request("/generate", b"{}")


@pytest.mark.parametrize(
    ("url", "host"),
    [
        (f"http://{LONG}:30000", f"{LONG}:30000"),
        (f"http://{LONG}.{LONG}.svc:8000", f"{LONG}.{LONG}.svc:8000"),
        ("http://127.0.0.1", "127.0.0.1"),
        ("http://[::1]:30000", "[::1]:30000"),
        ("http://[::1]", "[::1]"),
        ("http://bücher.example:30000", "xn--bcher-kva.example:30000"),
    ],
)
def test_the_host_alone_is_encoded(url: str, host: str) -> None:
    """Names of 58 to 63 letters, as Kubernetes makes them, are too long for one label only with a port behind them."""
    assert f"Host: {host}\r\n".encode() in head_of(url)
    assert urlsplit(URL.validate_python(url)).hostname


@pytest.mark.parametrize("url", ["http://a..b", f"http://{'a' * 64}:1", "http://a b", "http://.a"])
def test_what_cannot_be_a_host_is_refused_by_the_config(url: str) -> None:
    with pytest.raises(ValidationError):
        URL.validate_python(url)


async def test_a_key_is_stripped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a file or a secret it ends with a newline."""
    monkeypatch.setenv("SERVER_KEY", " secret\n")
    async with server(web.Response(text="{}")) as (url, asked):
        http = EngineHttp(
            name="e", url=url, kind="server", max_streams=1, connect_timeout_s=5, api_key_env="SERVER_KEY"
        )
        await http.ask_raw("/probe")
        assert asked[-1].headers["Authorization"] == "Bearer secret"
        await http.aclose()


@pytest.mark.parametrize("key", ["a\nb", "schlüssel-€", "\x7f!"])
async def test_a_key_that_no_header_can_carry_is_that_engines_problem(
    monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("SERVER_KEY", key)
    http = EngineHttp(
        name="e", url="http://127.0.0.1:9", kind="server", max_streams=1, connect_timeout_s=5, api_key_env="SERVER_KEY"
    )
    with pytest.raises(EngineUnavailable, match="SERVER_KEY") as caught:
        await http.ask_raw("/probe")
    assert key not in caught.value.message
    await http.aclose()


async def test_a_redirect_to_no_host_at_all_is_followed_nowhere() -> None:
    """Its name cannot be encoded: followed, it raised an error of the resolver that no adapter caught."""
    moved = web.Response(status=302, headers={"Location": f"http://{'a' * 80}/"})
    async with server(moved) as (url, asked):
        http = EngineHttp(name="e", url=url, kind="server", max_streams=1, connect_timeout_s=5)
        with anyio.fail_after(20), pytest.raises(EngineUnavailable, match="it redirects to"):
            await http.ask_raw("/probe")
        assert len(asked) == 1
        await http.aclose()


async def test_whatever_the_library_raises_is_an_engines_error() -> None:
    """A name that no config lets pass, for the errors that only the resolver knows."""
    http = EngineHttp(name="e", url="http://a..b:9", kind="server", max_streams=1, connect_timeout_s=5)
    with anyio.fail_after(20), pytest.raises(EngineUnavailable):
        await http.ask_raw("/probe")
    with anyio.fail_after(20), pytest.raises(EngineUnavailable):
        await http.stream("/generate", dict, {}, lambda _: False)
    await http.aclose()
