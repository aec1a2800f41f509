"""Fake SGLang and vLLM servers in processes of their own, for campaigns; not the real servers.

They say the same (``campaigns_script``) whichever is asked, and after any restart; the first ``IDENTITY`` tokens
of a response leave the server together.

Every server keeps a journal, a line of JSON for each request and each event that it sends, written before that is
sent: it outlives a SIGKILL. Times in it are those of the machine's monotonic clock, the same in all processes.

As a program it serves what its argument says (``campaigns_farm`` starts it), each server behind a proxy if wanted,
and takes orders on its standard input until that is closed.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

import anyio
import orjson
from aiohttp import web

from tests.campaigns.farm import Server
from tests.campaigns.script import IDENTITY, continued, prompt_length
from tests.support.fake_openai import FakeOpenAI
from tests.support.fake_server import FakeServer, Piece, Run, text_of
from tests.support.fake_sglang import FakeSGLang
from tests.support.fault_proxy import FaultProxy, Rates


@dataclass
class _Piece(Piece):
    matched: int | str | None = None
    number: int = 0
    given: int = 0


class Chained(FakeServer):
    """Makes a server of this kind of a fake; ``journal`` is a file descriptor."""

    def __init__(
        self,
        *,
        label: str = "",
        journal: int | None = None,
        first_token_s: float = 0.02,
        tokens_per_s: float = 200.0,
        **fake: Any,
    ) -> None:
        super().__init__(**{"chunk": IDENTITY, "context_tokens": 1 << 16} | fake)
        self.label = label
        self.lengths = tuple(fake.get("length", (20, 200)))
        self.journal = journal
        self.first_token_s = first_token_s
        self.tokens_per_s = tokens_per_s
        self.started_at = time.time()
        self.going = anyio.Event()
        self.going.set()
        self._numbers = 0

    def note(self, **entry: Any) -> None:
        if self.journal is not None:
            line = {"at": time.monotonic(), "engine": self.label, "life": os.getpid()} | entry
            os.write(self.journal, orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))

    def piece(
        self, tokens: list[int], *, stop: Sequence[str], stop_ids: Sequence[int], seed: int | None, greedy: bool, n: int
    ) -> Piece:
        assert not stop
        assert not stop_ids
        found, logprobs, is_end = continued(tokens, seed=None if greedy else seed, length=self._length(), n=n)
        begin = prompt_length(tokens)
        self._numbers += 1
        piece = _Piece(found, logprobs, "stop" if is_end else "length", text_of(found), number=self._numbers)
        piece.given = len(tokens) - begin
        said = text_of([*tokens[begin : begin + IDENTITY], *found][:IDENTITY])
        self.note(kind="ask", number=piece.number, prompt=text_of(tokens[:begin]), given=piece.given, identity=said)
        return piece

    def _length(self) -> tuple[int, int]:
        low, high = self.lengths
        return low, high

    def sent(self, piece: Piece, upto: int, reason: str | None) -> None:
        assert isinstance(piece, _Piece)
        self.note(kind="sent", number=piece.number, upto=piece.given + upto, reason=reason)

    async def begin(self, request: web.Request) -> None:
        """Until the first token; raises if the client has left meanwhile."""
        await anyio.sleep(self.first_token_s)
        await self.going.wait()
        if request.transport is None or request.transport.is_closing():
            raise ConnectionResetError

    async def held(self, run: Run, sent: int) -> None:
        await anyio.sleep(self.chunk / self.tokens_per_s)
        await self.going.wait()
        if not run.aborted.is_set():
            await self.resumed.wait()


class ChainSGLang(Chained, FakeSGLang):
    async def _stream(self, request: web.Request, *rest: Any, **how: Any) -> None:
        await self.begin(request)
        await super()._stream(request, *rest, **how)

    def _event(
        self, rid: str, piece: Piece, sent: int, upto: int, finish: dict[str, Any] | None, **how: Any
    ) -> dict[str, Any]:
        self.sent(piece, upto, finish and finish["type"])
        return super()._event(rid, piece, sent, upto, finish, **how)


class ChainVLLM(Chained, FakeOpenAI):
    async def _watch(self, request: web.Request, run: Run) -> None:
        while request.transport is not None and not request.transport.is_closing():  # noqa: ASYNC110 - nobody tells
            await anyio.sleep(0.02)
        run.aborted.set()

    async def _stream(self, request: web.Request, *rest: Any, **how: Any) -> None:
        await self.begin(request)
        await super()._stream(request, *rest, **how)

    def _event(self, piece: Piece, sent: int, upto: int, reason: str | None, **how: Any) -> dict[str, Any]:
        self.sent(piece, upto, reason)
        return super()._event(piece, sent, upto, reason, **how)


SERVERS: Final[dict[str, type[Chained]]] = {"sglang": ChainSGLang, "openai": ChainVLLM}


# -- their process ----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def _served(server: Server, journal: int | None) -> AsyncIterator[tuple[Chained, FaultProxy | None]]:
    fake = SERVERS[server.kind](label=server.name, journal=journal, **server.how)
    runner = web.AppRunner(fake.app(), shutdown_timeout=0.1)  # type: ignore[attr-defined]
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", server.port).start()
    server.port = runner.addresses[0][1]
    try:
        async with anyio.create_task_group() as tasks:
            proxy = None
            if server.proxy is not None:
                options: Mapping[str, Any] = server.proxy | {"rates": Rates(**server.proxy["rates"])}
                proxy = FaultProxy(server.port, port=server.proxy_port, **options)
                await tasks.start(proxy.run)
                server.proxy_port = proxy.port
            yield fake, proxy
            tasks.cancel_scope.cancel()
    finally:
        fake.going.set()
        fake.released.set()
        fake.resumed.set()
        await runner.cleanup()


def _obey(fake: Chained, proxy: FaultProxy | None, order: dict[str, Any]) -> Any:
    match order["do"]:
        case "stall":
            fake.going = anyio.Event()
        case "go":
            fake.going.set()
        case "counts":
            assert proxy is not None
            return dict(proxy.counts) | {"open": proxy.open_connections}
        case "rates":
            assert proxy is not None
            proxy.rates = Rates(**order["rates"])
        case "running":
            return len(fake.running)
    return None


def _is_news(record: logging.LogRecord) -> bool:
    """Clients leave at any time: that is what they are here for."""
    return not (record.exc_info and isinstance(record.exc_info[1], ConnectionError))


async def _main(spec: dict[str, Any]) -> None:
    logging.getLogger("aiohttp.server").addFilter(_is_news)
    journal = None
    if spec["journal"] is not None:
        journal = os.open(spec["journal"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    async with AsyncExitStack() as stack:
        servers = [Server(**entry) for entry in spec["servers"]]
        running = {server.name: await stack.enter_async_context(_served(server, journal)) for server in servers}
        print(json.dumps({server.name: [server.port, server.proxy_port] for server in servers}), flush=True)
        with open(0, "rb", closefd=False) as orders:  # noqa: ASYNC230 - opening costs nothing
            while line := await anyio.to_thread.run_sync(orders.readline, abandon_on_cancel=True):
                order = json.loads(line)
                print(json.dumps(_obey(*running[order["name"]], order)), flush=True)


if __name__ == "__main__":
    anyio.run(_main, json.loads(sys.argv[1]), backend_options={"use_uvloop": True})
