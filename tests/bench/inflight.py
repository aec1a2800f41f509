"""Thousands of generations in flight at an HTTP engine, all the way into buffers, beside bare aiohttp.

Generations are counted by their tokens and bytes: those of a start end together, and an end says when, not how much.
Daemon and bare client run at the same time, each with as many requests in flight at a server of its own, so that every
window is a round of both. The daemon's batches are taken out by a trainer, whose CPU time does not count.
"""

from __future__ import annotations

import json
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import orjson

from orchestrator.client import RolloutClient
from orchestrator.concurrency.broadcast import Broadcast
from orchestrator.daemon.assembly import Parts
from orchestrator.daemon.daemon import Daemon
from orchestrator.errors import OrchestratorError
from orchestrator.state import StateStore
from tests.bench.daemons import allow_descriptors, daemon, has_ended, process, write_config
from tests.bench.lag import Shared, p99_ms, watch_lag
from tests.bench.measure import Taken, cpu, cpu_of, cpu_ratio, exponent, wall
from tests.bench.prepared import answer_bytes, idle, read_bare, serve
from tests.bench.result import Figure, Goal, Options, Result, Unavailable
from tests.bench.work import PROMPT_TOKENS, SAMPLES

TOKENS = 1024
SIZES, RATE = (256, 4096, 16384), 512
QUICK_SIZES, QUICK_RATE = (64, 256, 1024), 256
"""In flight, and how many end a second: the time that a generation takes is the one over the other."""

WINDOW_S, QUICK_WINDOW_S = 4.0, 1.2
GROWING_DEADLINE_S = 120.0
GENERATIONS_BEFORE = 2
"""For each in flight: so many ends before it counts, so that those which began together have drifted apart."""


class WatchedDaemon(Daemon):
    """A daemon whose loop's lateness is counted."""

    def __init__(self, *args: Any, shared: Shared) -> None:
        super().__init__(*args)
        self._shared = shared

    async def _supervise(self, parts: Parts, store: StateStore, changed: Broadcast) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch_lag, self._shared)
            await super()._supervise(parts, store, changed)
            tasks.cancel_scope.cancel()


@dataclass
class Windows:
    """One size: a round a window; lateness in ms; memory in MB when the last one ended, and finished groups of that."""

    rounds: dict[str, list[Taken]]
    in_flight: float
    p99_ms: float
    idle_p99_ms: float
    memory_mb: float
    buffered_mb: float


@contextmanager
def trainer(path: Path) -> Iterator[None]:
    """A thread that takes batches and acknowledges them until the block ends."""
    stop = threading.Event()

    def train() -> None:
        with RolloutClient(path) as client:
            while not stop.is_set():
                try:
                    client.ack(client.get_batch(timeout_s=1).lease)
                except OrchestratorError:  # nothing within a second
                    continue

    thread = threading.Thread(target=train)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def memory_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    return 0.0


def listen() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0), backlog=4096)


def measure(folder: Path, in_flight: int, mean_s: float, window_s: float, rounds: int) -> Windows:
    folder.mkdir()
    lines = (json.dumps({"prompt": [i % 1000, *range(1, PROMPT_TOKENS)], "label": "x"}) for i in range(2000))
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    servers = [listen(), listen()]
    ports = [server.getsockname()[1] for server in servers]
    engine = {"kind": "sglang", "url": f"http://127.0.0.1:{ports[0]}", "max_in_flight": in_flight, "name": "prepared"}
    batch = max(2, in_flight // SAMPLES // 3)  # four of them planned: more than fits in flight
    config = write_config(
        folder,
        weights={"easy": "lambda step: 0.6", "hard": "lambda step: 0.4"},
        engines=[engine],
        rollout={"rollout_batch_size": batch, "lookahead": 4, "chunk_tokens": None},
        sampling={"max_new_tokens": TOKENS},
    )
    sampling = {"max_new_tokens": TOKENS, "temperature": 1.0}
    body = orjson.dumps(
        {"input_ids": list(range(PROMPT_TOKENS)), "sampling_params": sampling, "return_logprob": True, "stream": True}
    )
    bare_counts, late, idle_late = Shared(), Shared(), Shared()
    with (
        process(lambda: (allow_descriptors(), serve(servers[0], TOKENS, mean_s))),
        process(lambda: (allow_descriptors(), serve(servers[1], TOKENS, mean_s))),
        process(lambda: idle(idle_late)),
        process(lambda: (allow_descriptors(), read_bare(ports[1], in_flight, body, bare_counts))) as bare,
        daemon(config, WatchedDaemon, shared=late) as pid,
        RolloutClient(folder / "sock", connect_timeout_s=60) as client,
        trainer(folder / "sock"),
    ):
        for server in servers:
            server.close()
        return _windows(client, pid, bare, (bare_counts, late, idle_late), mean_s, window_s, rounds, in_flight)


def _windows(
    client: RolloutClient,
    pid: int,
    bare: int,
    shared: tuple[Shared, Shared, Shared],
    mean_s: float,
    window_s: float,
    rounds: int,
    in_flight: int,
) -> Windows:
    counts, late, idle_late = shared
    end = time.monotonic() + GROWING_DEADLINE_S
    before_it_counts = GENERATIONS_BEFORE * in_flight
    while time.monotonic() < end and min(_ended(client), counts.ended) < before_it_counts:
        if has_ended(bare):
            raise Unavailable("the bare client ended")
        time.sleep(0.1 * mean_s + 0.05)
    taken: dict[str, list[Taken]] = {"orchestrator": [], "bare aiohttp": []}
    turns, idle_turns, flying, whole_bytes = late.late(), idle_late.late(), [], answer_bytes(TOKENS)

    def now() -> tuple[float, ...]:
        return _tokens(client) / TOKENS, counts.read / whole_bytes, cpu_of(pid), cpu_of(bare)

    for _ in range(rounds):
        began, before = time.perf_counter(), now()
        time.sleep(window_s)
        flying.append(client.status()["engines"][0]["in_flight"])
        after, took = now(), time.perf_counter() - began
        if has_ended(bare):
            raise Unavailable("the bare client ended")
        ours, theirs, our_cpu, their_cpu = (y - x for x, y in zip(before, after, strict=True))
        taken["orchestrator"].append(Taken(took, our_cpu, max(1, ours)))
        taken["bare aiohttp"].append(Taken(took, their_cpu, max(1, theirs)))
    return Windows(
        taken,
        statistics.mean(flying),
        p99_ms(late.late() - turns),
        p99_ms(idle_late.late() - idle_turns),
        memory_mb(pid),
        sum(source["buffered_bytes"] for source in client.status()["sources"].values()) / (1 << 20),
    )


def _ended(client: RolloutClient) -> int:
    return int(client.status()["engines"][0]["completed"])


def _tokens(client: RolloutClient) -> int:
    return int(client.status()["engines"][0]["tokens"])


def run(options: Options) -> Result:
    result = Result("inflight", "Generations at an HTTP engine, into buffers", "a generation", "generations in flight")
    allow_descriptors()
    sizes, rate = (QUICK_SIZES, QUICK_RATE) if options.quick else (SIZES, RATE)
    window_s = QUICK_WINDOW_S if options.quick else WINDOW_S
    found: dict[int, Windows] = {}
    for n in sizes:
        try:
            found[n] = measure(options.folder / str(n), n, n / rate, window_s, options.rounds)
        except (OrchestratorError, Unavailable) as why:  # on too few cores a flood of ends leaves no time for a client
            result.missing.append(f"{n:,} in flight: {why}")
    if len(found) < 2:
        raise Unavailable("; ".join(result.missing))
    sizes = tuple(found)
    for size, windows in found.items():
        for name, taken in windows.rounds.items():
            result.figures.append(Figure(name, size, wall(taken), cpu(taken)))
    size = sizes[-1] if options.quick else sizes[1]
    at, first, last = found[size], found[sizes[0]], found[sizes[-1]]
    ratio = cpu_ratio(at.rounds, "orchestrator", "bare aiohttp")
    ended = 1e6 / wall(at.rounds["orchestrator"])
    late = at.p99_ms - at.idle_p99_ms
    thousands = (sizes[-1] - sizes[0]) / 1000
    memory, buffered = last.memory_mb - first.memory_mb, last.buffered_mb - first.buffered_mb
    result.goals += [
        Goal(f"CPU of ours, of bare aiohttp, {size:,} in flight", ratio, " x", at_most=1.3),
        *(
            Goal(f"the same, {n:,} in flight", cpu_ratio(found[n].rounds, "orchestrator", "bare aiohttp"), " x")
            for n in sizes
            if n != size
        ),
        Goal("read a second", ended, " generations"),
        Goal("in flight when looked at", at.in_flight, " generations"),
        Goal("loop's lag p99, beyond an idle loop's", late, " ms", at_most=20),
        Goal("an idle loop's lag p99", at.idle_p99_ms, " ms"),
        Goal("memory of 1,000 more in flight", memory / thousands, " MB", at_most=25),
        Goal("of that, finished groups in buffers", buffered / thousands, " MB"),
    ]
    points = [(f.size, f.cpu_us) for f in result.figures if f.contender == "orchestrator"]
    result.growth = (
        f"CPU time a generation grows as in flight^{exponent(points):.2f}, from {sizes[0]} to {sizes[-1]}"
        " (0: all of it is linear)"
    )
    return result
