"""Engines behind a proxy that resets, cuts, spoils, delays and silences: nothing leaks, and every token is right.

Twice: a pool with its adapters in this process, where tasks, sockets and allocations are counted exactly; and a real
daemon, whose descriptors and memory the kernel counts. Time is compressed: a request stalls after half a second, not
after a minute. Both are looked at in moments of quiet only. Run it by ``scripts/torture/faults``.
"""

from __future__ import annotations

import asyncio
import gc
import math
import os
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from contextlib import AsyncExitStack, ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import anyio

from orchestrator.engines import EnginePool, SamplingParams
from orchestrator.records import Sample
from tests.campaigns.checks import Failure, Trainer, arguments, check_accounts, must, scratch, until
from tests.campaigns.farm import Farm, Server
from tests.campaigns.script import problem_of
from tests.support.daemon_process import daemon, write_config
from tests.support.engine_pools import running_pool
from tests.support.fault_proxy import KINDS, Rates
from tests.support.specs import build_engine

LENGTH: Final = (20, 120)
LIMIT: Final = 120
SLOTS: Final = 12
STALL_S: Final = 0.5
REQUEST_TIMEOUT_S: Final = 5.0

STORM: Final = Rates(
    latency=0.05,
    throttle=0.05,
    reset=0.03,
    reset_in_reply=0.03,
    truncate=0.03,
    garbage=0.03,
    silence=0.02,
    silence_in_reply=0.03,
    refuse=0.01,
)
CALM: Final = Rates()

LEAKED_BYTES_A_SAMPLE: Final = 500
"""Of Python's own allocations. A task, a socket or a response that is held on to is several thousand."""

GROWTH: Final = 1.1
"""Of the daemon's anonymous memory, from a third of the way on."""


GENERATIONS: Final = ("/generate", "/v1/completions")


ENOUGH_CONNECTIONS: Final = 2000
"""Each kind of fault strikes one connection in a hundred or so: among this many one that is missing is no chance."""


class Battlefield:
    """The fakes, behind their proxies: one spoils everything, the others generations alone."""

    def __init__(self, seed: int) -> None:
        how = {"length": LENGTH, "tokens_per_s": 400.0}
        proxy = {"rates": asdict(CALM), "strike_bytes": [1, 6000], "latency_s": [0.02, 0.3]}
        kinds = (("sglang", {}), ("openai", {}), ("sglang", {"incremental": True}))
        self.servers = [
            Server(
                name=f"{kind}-{i}",
                kind=kind,
                how=how | more,
                proxy=proxy | {"seed": seed + i, "only": GENERATIONS if i else ()},
            )
            for i, (kind, more) in enumerate(kinds)
        ]
        self.farm = Farm(*self.servers)

    def rates(self, rates: Rates) -> None:
        for server in self.servers:
            self.farm.order(server.name, "rates", rates=asdict(rates))

    def counts(self) -> Counter[str]:
        return sum((Counter(self.farm.order(server.name, "counts")) for server in self.servers), Counter[str]())

    def check(self) -> Counter[str]:
        """Faults were really done: all kinds of them where there were connections enough, most of them otherwise."""
        counts = self.counts()
        missing = [kind for kind in KINDS if not counts[kind]]
        allowed = 0 if counts["connections"] >= ENOUGH_CONNECTIONS else len(KINDS) // 3
        must(len(missing) <= allowed, f"{', '.join(missing)} never happened: {counts}")
        return counts


# -- in this process --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Held:
    """What a process holds in a moment of quiet."""

    tasks: int
    descriptors: int
    allocated: int


def descriptors(pid: int | str = "self") -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


async def held() -> Held:
    gc.collect()
    return Held(len(asyncio.all_tasks()), descriptors(), tracemalloc.get_traced_memory()[0])


class InProcess:
    """A pool and its adapters."""

    def __init__(self, pool: EnginePool) -> None:
        self._pool = pool
        self._samples = 0
        self._room = anyio.Semaphore(SLOTS * 3)

    async def round(self, samples: int) -> None:
        """So many samples, each checked."""
        async with anyio.create_task_group() as tasks:
            for _ in range(samples):
                self._samples += 1
                tasks.start_soon(self._sample, self._samples)

    async def _sample(self, index: int) -> None:
        async with self._room:
            prompt = list(f"maths {index}=".encode())
            sample = Sample(index=index)
            await self._pool.generate(sample, prompt, SamplingParams(max_new_tokens=LIMIT))
        assert sample.logprobs is not None
        problem = problem_of(prompt, sample.tokens, sample.logprobs, length=LENGTH, limit=LIMIT)
        must(problem is None, f"sample {index}: {problem}")

    async def quiet(self, wanted: Callable[[Held], bool]) -> Held:
        """What is held once nothing is going on; a probe may be, at any one moment."""
        now = await held()
        with anyio.move_on_after(10.0):
            while not wanted(now):
                await anyio.sleep(0.05)
                now = await held()
        return now


async def run_in_process(*, samples: int, seed: int) -> str:
    """Raises ``Failure``; returns what there was."""
    async with AsyncExitStack() as stack:
        field = Battlefield(seed)
        stack.enter_context(field.farm)
        engines = [build_engine(server.config(max_in_flight=SLOTS), workdir=Path()) for server in field.servers]
        deadlines = {"stall_s": STALL_S, "request_timeout_s": REQUEST_TIMEOUT_S, "max_retries": 1000}
        pool = await stack.enter_async_context(running_pool(*engines, **deadlines))
        tracemalloc.start()
        stack.callback(tracemalloc.stop)
        work = InProcess(pool)
        await work.round(60)
        before = await work.quiet(lambda _: pool.in_flight == 0)
        field.rates(STORM)
        await work.round(samples // 2)
        half = await work.quiet(lambda _: pool.in_flight == 0)
        await work.round(samples // 2)
        field.rates(CALM)
        await work.round(30)
        counts = field.check()
        after = await work.quiet(lambda now: now.tasks <= before.tasks and now.descriptors <= before.descriptors)
    must(after.tasks <= before.tasks, f"tasks: {before.tasks} before, {after.tasks} after")
    must(
        after.descriptors <= before.descriptors, f"descriptors: {before.descriptors} before, {after.descriptors} after"
    )
    leaked = after.allocated - half.allocated
    must(leaked < LEAKED_BYTES_A_SAMPLE * samples, f"{leaked} bytes more than half way, after {samples // 2} samples")
    return (
        f"{samples} samples right; tasks {after.tasks}, descriptors {after.descriptors}, {leaked} bytes; {dict(counts)}"
    )


# -- a real daemon ----------------------------------------------------------------------------------------------------


def resident_kb(pid: int) -> int:
    """Anonymous memory: mapped files of the log are not counted."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def run_daemon(folder: Path, *, batches: int, minutes: float, seed: int) -> str:
    """So many batches, or as many as there are in so many minutes; raises ``Failure``, returns what there was."""
    with ExitStack() as stack:
        field = Battlefield(seed)
        stack.enter_context(field.farm)
        path = write_config(
            folder,
            rollout={"rollout_batch_size": 4, "n_samples_per_prompt": 3},
            sampling={"max_new_tokens": LIMIT},
            engines=[server.config(max_in_flight=SLOTS) for server in field.servers],
            engine_defaults={"stall_s": STALL_S, "request_timeout_s": REQUEST_TIMEOUT_S, "max_retries": 50},
        )
        process = stack.enter_context(daemon(path))
        client = stack.enter_context(process.connect())
        assert process.process is not None
        pid, trainer, quiet = process.process.pid, Trainer(), []

        def rest(limit: float) -> None:
            client.pause_generation("finish", timeout_s=60.0)
            until(lambda: descriptors(pid) <= limit, lambda: f"{descriptors(pid)} descriptors, not {limit}")
            quiet.append((descriptors(pid), resident_kb(pid)))
            client.continue_generation()

        for _ in range(5):
            trainer.take(client)
        rest(math.inf)
        most = quiet[0][0]
        field.rates(STORM)
        ends, every = time.monotonic() + minutes * 60, max(2, batches // 6)
        while trainer.batches < batches or time.monotonic() < ends:
            trainer.take(client)
            if trainer.batches % every == 0:
                rest(most)
        field.rates(CALM)
        for _ in range(5):
            trainer.take(client)
        rest(most)
        counts = field.check()
        check_accounts(client.status())
        must(process.stop() == 0, f"the daemon ended badly: {process.stderr}")
    check_tokens(trainer)
    memory = [kilobytes for _, kilobytes in quiet]
    third = max(memory[: len(memory) // 3 + 1])
    must(memory[-1] <= GROWTH * third, f"the daemon's memory grows, in kB: {memory}")
    return f"{len(trainer.samples)} samples right; {most} descriptors; memory in kB: {memory}; {dict(counts)}"


def check_tokens(trainer: Trainer) -> None:
    for sample in trainer.samples:
        problem = problem_of(sample.prompt, sample.tokens, sample.logprobs, length=LENGTH, limit=LIMIT)
        must(problem is None, f"sample {sample.index}: {problem}")


def main() -> None:
    options = arguments(__doc__ or "", minutes=5.0, samples=2000)
    runs: dict[str, Callable[[Path], Any]] = {
        "in one process": lambda _: anyio.run(
            lambda: run_in_process(samples=options.samples, seed=options.seed), backend_options={"use_uvloop": True}
        ),
        "a daemon": lambda folder: run_daemon(folder, batches=60, minutes=options.minutes, seed=options.seed),
    }
    failed = False
    for name, run in runs.items():
        try:
            with scratch() as folder:
                print(f"{name}: {run(folder)}", flush=True)
        except Failure as failure:
            failed = True
            print(f"{name}: {failure}", flush=True)
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
