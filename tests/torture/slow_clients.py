"""A trainer beside 1,000 connections that say nothing and 200 that send a byte a second, against the same one alone.

Rounds with and without them take turns, so that a busy machine slows both. Run it by ``scripts/torture/slow-clients``.
"""

from __future__ import annotations

import math
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import anyio
import anyio.abc

from orchestrator.client import RolloutClient
from orchestrator.frames import encode_frame
from tests.campaigns.checks import arguments, must, scratch, until
from tests.support.daemon_process import daemon, write_config
from tests.support.paths import ROOT

SLOWDOWN_LIMIT: Final = 2.0
AGAIN_S: Final = 1.0
"""From when the daemon closed a hostile connection to its next try."""

BYTE_EVERY_S: Final = 1.0
WORK_S: Final = 0.01
"""For which the trainer works on a batch; the next one is made meanwhile, so that production is not what is timed."""

WARM_UP: Final = 20
"""Batches that are not counted."""

HELLO: Final = encode_frame({"id": 1, "method": "hello", "params": {"client": "idle"}})
LONG: Final = encode_frame({"id": 1, "method": "status", "params": {}, "padding": "x" * 10_000})


# -- the hostile ones, in a process of their own -----------------------------------------------------------------------


async def hostile(path: str, idle: int, slow: int) -> None:
    """Open and keep all connections, until standard input ends; says when all have been opened once."""
    opened = anyio.Semaphore(0)
    async with anyio.create_task_group() as tasks:
        for i in range(idle):
            tasks.start_soon(_keep, path, _idle, i, opened)
        for i in range(slow):
            tasks.start_soon(_keep, path, _slow, i, opened)
        for _ in range(idle + slow):
            await opened.acquire()
        print("ready", flush=True)
        await anyio.wait_readable(sys.stdin)
        tasks.cancel_scope.cancel()


async def _keep(path: str, talk: Any, number: int, opened: anyio.Semaphore) -> None:
    """One connection, opened again a second after each end."""
    is_first = True
    while True:
        with suppress(OSError, anyio.BrokenResourceError, anyio.EndOfStream):
            async with await anyio.connect_unix(path) as stream:
                if is_first:
                    opened.release()
                    is_first = False
                await talk(stream, number)
        await anyio.sleep(AGAIN_S)


async def _idle(stream: anyio.abc.ByteStream, number: int) -> None:
    """Silent; every second one has said hello."""
    if number % 2:
        await stream.send(HELLO)
    while True:
        await stream.receive()


async def _slow(stream: anyio.abc.ByteStream, number: int) -> None:
    await anyio.sleep(number % 10 / 10 * BYTE_EVERY_S)
    for i in range(len(LONG)):
        await stream.send(LONG[i : i + 1])
        await anyio.sleep(BYTE_EVERY_S)


@contextmanager
def beside(path: Path, idle: int, slow: int) -> Iterator[None]:
    """The hostile ones are there."""
    command = [sys.executable, "-m", "tests.torture.slow_clients", "--hostile", str(path), str(idle), str(slow)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            must(process.stdout.readline() == b"ready\n", "the hostile clients did not all get in")
            yield
        finally:
            process.stdin.close()
            process.wait(20)


# -- the trainer -------------------------------------------------------------------------------------------------------


@dataclass
class Times:
    """Seconds of each ``get_batch`` with its ``ack``, and of each connection of a new client."""

    batches: list[float] = field(default_factory=list)
    entries: list[float] = field(default_factory=list)

    def batch_ms(self, quantile: float) -> float:
        ordered = sorted(self.batches)
        return ordered[min(len(ordered) - 1, math.ceil(quantile * len(ordered)) - 1)] * 1e3


@dataclass(frozen=True)
class Outcome:
    alone: Times
    beside: Times
    connections: int
    """Most that the daemon had at the end of a round."""

    @property
    def slowdown(self) -> float:
        return self.beside.batch_ms(0.99) / self.alone.batch_ms(0.99)


def train(path: Path, client: RolloutClient, batches: int, times: Times) -> None:
    """Take and acknowledge batches; then let another client in."""
    for i in range(WARM_UP + batches):
        began = time.perf_counter()
        client.ack(client.get_batch(timeout_s=30).lease)
        if i >= WARM_UP:
            times.batches.append(time.perf_counter() - began)
        time.sleep(WORK_S)
    began = time.perf_counter()
    with RolloutClient(path, connect_timeout_s=30) as other:
        other.connect()
    times.entries.append(time.perf_counter() - began)


def run(folder: Path, *, rounds: int, batches: int, idle: int, slow: int, limit: int) -> Outcome:
    """The same trainer, over one connection, with and without the others beside it; at most ``limit`` connections."""
    config = write_config(folder, rollout={"rollout_batch_size": 8}, consumer={"max_connections": limit})
    alone, crowded, most = Times(), Times(), 0
    with daemon(config) as process, process.connect() as client:
        for _ in range(rounds):
            until(lambda: len(client.status()["connections"]) == 1, "a daemon with one client")
            train(process.socket, client, batches, alone)
            with beside(process.socket, idle, slow):
                train(process.socket, client, batches, crowded)
                most = max(most, len(client.status()["connections"]))
        must(process.stop() == 0, process.stderr)
    return Outcome(alone, crowded, most)


def check(outcome: Outcome) -> None:
    """Raises ``Failure``."""
    must(
        outcome.slowdown < SLOWDOWN_LIMIT,
        f"p99 of get_batch and ack is {outcome.slowdown:.2f} times what it is alone; {SLOWDOWN_LIMIT:g} are allowed",
    )


def report(outcome: Outcome) -> None:
    print(f"{'get_batch + ack, ms':<22}{'p50':>8}{'p99':>8}{'most':>8}{'batches':>9}   new client, ms (most)")
    for name, times in (("alone", outcome.alone), ("beside the others", outcome.beside)):
        p50, p99, most = (times.batch_ms(quantile) for quantile in (0.5, 0.99, 1.0))
        entry = max(times.entries) * 1e3
        print(f"{name:<22}{p50:>8.2f}{p99:>8.2f}{most:>8.2f}{len(times.batches):>9}   {entry:.1f}")
    print(f"p99 beside them is {outcome.slowdown:.2f} times that alone; {outcome.connections} connections were open")


def main() -> None:
    if sys.argv[1:2] == ["--hostile"]:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        anyio.run(hostile, sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
        return
    options = arguments(__doc__ or "", rounds=12, batches=150, idle=1_000, slow=200, limit=2_048)
    with scratch() as folder:
        outcome = run(
            folder,
            rounds=options.rounds,
            batches=options.batches,
            idle=options.idle,
            slow=options.slow,
            limit=options.limit,
        )
        report(outcome)
        check(outcome)
    print("slow-clients: the trainer hardly notices them")


if __name__ == "__main__":
    main()
