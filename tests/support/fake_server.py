"""What the fakes of inference servers share: a real HTTP server, a script of responses, faults on demand.

The responses are those of :class:`~orchestrator.engines.ScriptedEngine`, so that a test can compare token by token. A
server is not told where the prompt ends: a request that goes on with a response of this fake gets the rest of it, any
other begins a response of its own, drawn by its seed (greedy ones by none).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import orjson
from aiohttp import web

from orchestrator.engines import SamplingParams, ScriptedEngine

END_OF_SEQUENCE = 256
END_PIECE = "<|end|>"
LONGEST = 1 << 15
FAULT_AFTER_TOKENS = 6


@dataclass
class Response:
    prompt: list[int]
    stops: tuple[tuple[str, ...], tuple[int, ...]]
    tokens: list[int]
    logprobs: list[float]


@dataclass
class Piece:
    tokens: list[int]
    logprobs: list[float]
    reason: str
    text: str
    """Of the whole piece, without control tokens and what matched a stop."""
    matched: int | str | None
    """The stop token or stop text that ended it."""

    def text_until(self, n: int) -> str:
        """What a server that does not wait for stop texts has said after ``n`` tokens."""
        return text_of(self.tokens[:n])


@dataclass
class Run:
    """A generation under way; ``aborted`` ends it."""

    rid: str
    aborted: asyncio.Event = field(default_factory=asyncio.Event)


def text_of(tokens: Sequence[int]) -> str:
    return bytes(token for token in tokens if token < END_OF_SEQUENCE).decode("utf-8", "replace")


def tokens_of(text: str) -> list[int]:
    """Special tokens are always seen as such."""
    parts = [list(part.encode()) for part in text.split(END_PIECE)]
    joined = parts[0]
    for part in parts[1:]:
        joined += [END_OF_SEQUENCE, *part]
    return joined


class FakeServer:
    """See the module's docstring.

    ``faults`` names what is wrong with the coming generations, one each; ``hold_after``: after so many tokens a
    generation waits to be aborted or released. ``requests`` are the bodies of all generations that were asked for.
    ``asked`` are the paths of all requests, ``posted`` those of posts with their bodies, in the order in which they
    came. ``path_faults`` says of a path what it does instead of answering: a status, ``reset`` or ``silence``.
    """

    def __init__(
        self,
        *,
        length: tuple[int, int] = (20, 200),
        context_tokens: int = 1024,
        chunk: int = 3,
        index_of: Callable[[int], int] = lambda seed: seed,
    ) -> None:
        self.script = ScriptedEngine(name="script", time_scale=0, length=length)
        self.context_tokens = context_tokens
        self.chunk = chunk
        self.index_of = index_of
        self.faults: list[str] = []
        self.hold_after: int | None = None
        self.released = asyncio.Event()
        self.requests: list[dict[str, Any]] = []
        self.asked: list[str] = []
        self.posted: list[tuple[str, Any]] = []
        self.path_faults: dict[str, str] = {}
        self.started_at: float | str | None = 1000.5
        self.running: dict[str, Run] = {}
        self.resumed = asyncio.Event()
        self.resumed.set()
        self.url = ""
        self._known: list[Response] = []

    @web.middleware
    async def seen(self, request: web.Request, handler: Any) -> web.StreamResponse:
        """Middleware of all fakes."""
        self.asked.append(request.path)
        if request.method == "POST":
            body = await request.read()
            self.posted.append((request.path_qs, orjson.loads(body) if body else None))
        fault = self.path_faults.get(request.path, "")
        if fault.isdecimal():
            return json_answer({"error": {"message": "so it was wanted"}}, int(fault))
        if fault == "reset":
            assert request.transport is not None
            request.transport.abort()
        if fault == "silence":
            await self.released.wait()
        response: web.StreamResponse = await handler(request)
        return response

    async def metrics(self, request: web.Request) -> web.Response:
        if self.started_at is None:
            raise web.HTTPNotFound
        lines = ["# TYPE process_start_time_seconds gauge", f"process_start_time_seconds {self.started_at}", "x 1"]
        return web.Response(text="\n".join(lines) + "\n")

    # -- what it says --------------------------------------------------------------------------------------------------

    def piece(
        self, tokens: list[int], *, stop: Sequence[str], stop_ids: Sequence[int], seed: int | None, greedy: bool, n: int
    ) -> Piece:
        stops = (tuple(stop), tuple(stop_ids))
        response = next((known for known in self._known if _continues(known, tokens, stops)), None)
        if response is None:
            sampling = SamplingParams(max_new_tokens=LONGEST, stop=stops[0], stop_token_ids=stops[1])
            index = self.index_of(0 if greedy or seed is None else seed)
            response = Response(tokens, stops, *self.script.expected_response(tokens, sampling, index))
            self._known.append(response)
        at = len(tokens) - len(response.prompt)
        found = response.tokens[at : at + n]
        reason = "stop" if at + n >= len(response.tokens) else "length"
        text = text_of(found)
        matched: int | str | None = found[-1] if found and found[-1] in stop_ids else None
        for one in stop:
            if reason == "stop" and one in text:
                text, matched = text.split(one)[0], one
        return Piece(found, response.logprobs[at : at + n], reason, text, matched)

    def refusal(self, tokens: Sequence[int], n: int) -> str | None:
        """What real servers say of requests that cannot be."""
        if len(tokens) + n > self.context_tokens:
            return f"{len(tokens)} + {n} tokens are longer than the context of {self.context_tokens}"
        if not tokens or min(tokens) < 0 or max(tokens) > END_OF_SEQUENCE:
            return "a token id is out of vocabulary"
        return None

    # -- how it says it ------------------------------------------------------------------------------------------------

    async def held(self, run: Run, sent: int) -> None:
        """Wait where the test wants a generation to wait."""
        if self.hold_after is not None and sent >= self.hold_after:
            waits = [asyncio.ensure_future(event.wait()) for event in (run.aborted, self.released)]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()
        if not run.aborted.is_set():
            await self.resumed.wait()
        await asyncio.sleep(0)

    def take_fault(self) -> str:
        return self.faults.pop(0) if self.faults else ""

    async def break_off(self, fault: str, request: web.Request, response: web.StreamResponse) -> None:
        """Faults of the connection, in the middle of a stream."""
        assert request.transport is not None
        match fault:
            case "reset":
                request.transport.abort()
            case "cut":
                await response.write(b'data: {"text": "abc", "meta_in')
                request.transport.close()
            case "garbage":
                await response.write(b"data: {nonsense\n\n")
            case "silence":
                await self.released.wait()

    @asynccontextmanager
    async def serving(self, app: web.Application) -> AsyncIterator[None]:
        runner = web.AppRunner(app, shutdown_timeout=0.5)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"
        try:
            yield
        finally:
            self.released.set()
            self.resumed.set()
            await runner.cleanup()


def _continues(known: Response, tokens: Sequence[int], stops: tuple[tuple[str, ...], tuple[int, ...]]) -> bool:
    begin = len(known.prompt)
    rest = list(tokens[begin:])
    return known.stops == stops and list(tokens[:begin]) == known.prompt and rest == known.tokens[: len(rest)] != []


async def until(condition: Callable[[], bool]) -> None:
    """Return when it is so; the caller sets a deadline, at the latest that of the test."""
    while not condition():  # noqa: ASYNC110 - it comes true in a server, which tells nobody
        await asyncio.sleep(0.001)


def json_answer(value: Any, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(value), status=status, content_type="application/json")


def event_of(value: Any) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"
