"""An inference server that has its answers ready, and a bare aiohttp client: each for a process of its own.

The server speaks as much of SGLang as a run needs. A generation is sixteen events of an incremental stream, evenly over
its time, which is drawn from half to one and a half of the mean, so that ends are spread.
"""

from __future__ import annotations

import asyncio
import random
import socket
from typing import Any, Final

import aiohttp
import orjson
import uvloop

from tests.bench.lag import Shared, watch_lag

EVENTS: Final = 16
VARIANTS: Final = 8
CONTEXT_TOKENS: Final = 1 << 20
BEGUN_AT_ONCE, BEGIN_INTERVAL_S = 64, 0.01
"""Of the bare client: a server resets connections when thousands wait to be accepted."""

RETRY_S: Final = 0.1
HEAD: Final = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
ANSWERS: Final[dict[bytes, Any]] = {
    b"/model_info": {"model_path": "m", "weight_version": "default"},
    b"/v1/models": {"data": [{"id": "m", "max_model_len": CONTEXT_TOKENS}]},
    b"/tokenize": {"tokens": [1, 2, 3]},
    b"/metrics": "",
}


def events(tokens: int, seed: int) -> list[bytes]:
    """The chunks of one answer."""
    draw, made, step = random.Random(seed), [], tokens // EVENTS
    for i in range(EVENTS):
        entries = [[-3 * draw.random(), draw.randrange(100_000), None] for _ in range(step)]
        meta = {
            "id": "r",
            "finish_reason": None if i < EVENTS - 1 else {"type": "length", "length": tokens},
            "prompt_tokens": 256,
            "completion_tokens": step * (i + 1),
            "output_token_logprobs": entries,
        }
        event = b"data: " + orjson.dumps({"text": "word" * step, "meta_info": meta}) + b"\n\n"
        if i == EVENTS - 1:
            event += b"data: [DONE]\n\n"
        made.append(b"%x\r\n%b\r\n" % (len(event), event))
    made[-1] += b"0\r\n\r\n"
    return made


def answer_bytes(tokens: int) -> float:
    """What an answer has without its chunks' framing, on average."""
    sizes = [sum(len(x.split(b"\r\n", 1)[1]) - 2 for x in events(tokens, seed)) - 5 for seed in range(VARIANTS)]
    return sum(sizes) / VARIANTS


class _Answer(asyncio.Protocol):
    """One connection; requests do not overlap on it."""

    def __init__(self, ready: list[list[bytes]], mean_s: float, draw: random.Random) -> None:
        self._ready, self._mean_s, self._draw = ready, mean_s, draw
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._request = bytearray()

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        self._request += data
        head, found, body = self._request.partition(b"\r\n\r\n")
        if not found:
            return
        length = next((int(x[15:]) for x in head.split(b"\r\n") if x[:15].lower() == b"content-length:"), 0)
        if len(body) < length:
            return
        self._request.clear()
        path = bytes(head.split(b" ", 2)[1])
        if path == b"/generate":
            chunks = self._draw.choice(self._ready)
            self._transport.write(HEAD)
            self._go_on(chunks, 0, self._mean_s * (0.5 + self._draw.random()) / EVENTS)
            return
        answer = orjson.dumps(ANSWERS.get(path, {}))
        self._transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(answer), answer))

    def _go_on(self, chunks: list[bytes], i: int, pause_s: float) -> None:
        if i:
            self._transport.write(chunks[i - 1])
        if i < EVENTS:
            self._timer = self._loop.call_later(pause_s, self._go_on, chunks, i + 1, pause_s)


def serve(listener: socket.socket, tokens: int, mean_s: float) -> None:
    """Serve for ever."""

    async def main() -> None:
        ready, draw = [events(tokens, i) for i in range(VARIANTS)], random.Random(1)
        server = await asyncio.get_running_loop().create_server(lambda: _Answer(ready, mean_s, draw), sock=listener)
        await server.serve_forever()

    uvloop.run(main())


def read_bare(port: int, in_flight: int, body: bytes, shared: Shared) -> None:
    """Read answers for ever, so many at a time, with aiohttp and nothing else; counts them and their bytes."""

    async def one(session: aiohttp.ClientSession) -> None:
        while True:
            try:
                async with session.post(f"http://127.0.0.1:{port}/generate", data=body) as response:
                    async for part in response.content.iter_any():
                        shared.add_read(len(part))
            except aiohttp.ClientError:  # too many connections at once, or one that ended as it was used again
                await asyncio.sleep(RETRY_S)
            else:
                shared.add_ended()

    async def main() -> None:
        connector = aiohttp.TCPConnector(limit=0)
        async with (
            aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as session,
            asyncio.TaskGroup() as tasks,
        ):
            for i in range(in_flight):
                tasks.create_task(one(session))
                if i % BEGUN_AT_ONCE == BEGUN_AT_ONCE - 1:
                    await asyncio.sleep(BEGIN_INTERVAL_S)

    uvloop.run(main())


def idle(shared: Shared) -> None:
    """A loop with nothing to do, for how late it is by itself."""
    uvloop.run(watch_lag(shared))
