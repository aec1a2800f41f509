"""Ten thousand buffered groups: what snapshots, compaction and a restart cost the loop, and how soon a restart serves.

Run it by ``scripts/torture/state-scale``.
"""

from __future__ import annotations

import argparse
import asyncio
import asyncio.events
import gc
import sys
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel

from orchestrator.core.ledger.events import Dropped
from orchestrator.core.ledger.ledger import SourceSize
from orchestrator.frames import encode_group
from orchestrator.records import Group, Prompt, Sample, SampleStatus
from orchestrator.state import StateStore
from tests.support.group_frames import iter_group_frames
from tests.torture.client import Talk
from tests.torture.daemon import ForkedDaemon, imported, prepare, scratch
from tests.torture.model import ROWS

LIMIT_MS = 5.0
RESTART_S_PER_GB = 5.0
RESTART_FLOOR_S = 1.0
"""What a start takes without any state, on a busy machine."""

TURN_S = 0.001

HELP = """Builds a state of many buffered groups, small ones for their number and large ones for their bytes, and
measures each callback of the event loop by the CPU time of its thread while the store opens, snapshots and compacts;
beside it how late the loop is, and how late an idle one is in the same process. Then a real daemon starts on that
state, and the time to its first batch is taken. Fails where a callback takes more than 5 ms of CPU time, or the first
batch more than 5 s per GB (and a second for an empty state)."""

SIZES = {"easy": SourceSize(ROWS), "hard": SourceSize(ROWS)}


@dataclass
class Measured:
    """The callbacks and the lag of one phase; CPU and lag in milliseconds."""

    name: str
    callbacks: int = 0
    worst: float = 0.0
    worst_wall: float = 0.0
    worst_name: str = ""
    lags: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def line(self) -> str:
        lags = sorted(self.lags) or [0.0]
        return (
            f"  {self.name:34} {self.seconds:7.2f} s {self.callbacks:8} {self.worst:8.2f} {self.worst_wall:8.2f}"
            f" {lags[int(0.99 * (len(lags) - 1))]:8.2f} {lags[-1]:8.2f}"
        )


HEADER = f"  {'phase':34} {'took':>9} {'calls':>8} {'CPU max':>8} {'max':>8} {'lag p99':>8} {'max':>8}   (ms)"


@contextmanager
def callbacks(measured: Measured) -> Iterator[None]:
    """Measure every callback of the loop that begins in the block."""
    real = asyncio.events.Handle._run

    def timed(handle: asyncio.Handle) -> None:
        wall, cpu = time.perf_counter(), time.thread_time()
        callback = getattr(handle, "_callback", None)
        real(handle)
        took = 1000 * (time.thread_time() - cpu)
        measured.callbacks += 1
        measured.worst_wall = max(measured.worst_wall, 1000 * (time.perf_counter() - wall))
        if took > measured.worst:
            measured.worst, measured.worst_name = took, repr(callback)[:300]

    asyncio.events.Handle._run = timed  # type: ignore[method-assign]
    began = time.perf_counter()
    try:
        yield
    finally:
        measured.seconds = time.perf_counter() - began
        asyncio.events.Handle._run = real  # type: ignore[method-assign]


async def _lag(measured: Measured) -> None:
    while True:
        began = time.perf_counter()
        await anyio.sleep(TURN_S)
        measured.lags.append(1000 * (time.perf_counter() - began - TURN_S))


async def phase(name: str, work: Any) -> Measured:
    """Run a coroutine function with a ticking task beside it."""
    measured = Measured(name)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_lag, measured)
        await anyio.lowlevel.checkpoint()
        with callbacks(measured):
            await anyio.lowlevel.checkpoint()  # what runs now is in a callback that began unmeasured
            await work()
        tasks.cancel_scope.cancel()
    return measured


# -- the state ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    name: str
    groups: int
    samples: int
    tokens: int


def frame(source: str, index: int, prompt: int, epoch: int, shape: Shape) -> bytes:
    tokens, logprobs = array("i", [7]) * shape.tokens, array("f", [-0.5]) * shape.tokens
    samples = [
        Sample(
            index=index * shape.samples + i,
            tokens=tokens,
            logprobs=logprobs,
            versions=[[0, shape.tokens]],
            status=SampleStatus.COMPLETED,
            finish_reason="stop",
            reward=1.0,
            text="word " * (shape.tokens // 2),
        )
        for i in range(shape.samples)
    ]
    return encode_group(Group(source, index, Prompt(source, prompt, epoch, "prompt"), array("i", [1]) * 256, samples))


async def build(directory: Path, shape: Shape) -> None:
    store = await StateStore.open(directory, SIZES)
    async with anyio.create_task_group() as tasks:
        await tasks.start(store.run)
        for i in range(shape.groups):
            source = ("easy", "hard")[i % 2]
            event = store.ledger.next_launch(source, shape.samples, lambda _, position: position)
            assert event is not None
            store.record(event)
            store.store_group(frame(source, event.group_index, event.prompt_index, event.epoch, shape))
            if i % 100 == 99:
                await store.written()
        tasks.cancel_scope.cancel()
    await store.aclose()


async def measure(directory: Path, shape: Shape) -> list[Measured]:
    lines = [await phase("idle", lambda: anyio.sleep(0.5))]
    opened: list[StateStore] = []

    async def open_it() -> None:
        opened.append(await StateStore.open(directory, SIZES))

    lines.append(await phase("open", open_it))
    [store] = opened
    gc.collect()  # as the daemon does once it has started: what was read back lives long
    gc.freeze()
    async with anyio.create_task_group() as tasks:

        async def start() -> None:
            await tasks.start(store.run)

        lines.append(await phase("start, first snapshot", start))

        async def snapshots() -> None:
            for _ in range(5):
                await store.snapshot()

        lines.append(await phase("five snapshots", snapshots))
        lines.append(await phase("compaction, nothing is sparse", store.compact))
        await _thin_out(store)
        lines.append(await phase("snapshot, segments removed", store.snapshot))
        lines.append(await phase("compaction", store.compact))
        lines.append(await phase("two snapshots after it", lambda: _twice(store)))
        tasks.cancel_scope.cancel()

    async def close() -> None:
        await store.aclose()

    lines.append(await phase("close, last snapshot", close))
    return lines


async def _twice(store: StateStore) -> None:
    await store.snapshot()
    await store.snapshot()


async def _thin_out(store: StateStore) -> None:
    """Leave every eighth group, so that all segments are sparse."""
    for state in store.ledger.sources.values():
        for i, index in enumerate(list(state.ready)):
            if i % 8:
                store.record(Dropped(state.name, index, "stale", [], False))
            if i % 50 == 0:
                await anyio.lowlevel.checkpoint()
    await store.written()


def first_batch(folder: Path, directory: Path, shape: Shape) -> float:
    """Seconds from the start of a real daemon to the first batch in a client's hands."""
    config = prepare(folder, rollout={"n_samples_per_prompt": shape.samples}, run={"state_dir": str(directory)})
    daemon = ForkedDaemon(config, settings=lambda: None)
    try:
        began = time.perf_counter()
        daemon.go()
        talk = daemon.connect()
        assert isinstance(talk, Talk), daemon.stderr
        _, payload = talk.ask("get_batch", timeout_s=25)
        took = time.perf_counter() - began
        assert len(list(iter_group_frames(payload))) == 4
        talk.close()
        return took
    finally:
        daemon.close()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="state-scale", description=HELP, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--groups", type=int, default=10_000, help="of the small shape: 2 samples of 16 tokens")
    parser.add_argument("--large", type=int, default=10_000, help="of the large one: 8 samples of 1,024 tokens, 115 KB")
    parser.add_argument("--huge", type=int, default=60, help="of the largest: 24 samples of 32,768 tokens, 9 MB")
    parser.add_argument("--keep", type=Path, help="where the state is made, and stays if something is wrong")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    imported()
    failures = []
    shapes = [
        Shape("small", options.groups, 2, 16),
        Shape("large", options.large, 8, 1024),
        Shape("huge", options.huge, 24, 32768),
    ]
    for shape in shapes:
        if not shape.groups:
            continue
        with scratch(options.keep, "state-scale") as folder:
            directory = folder / "state"
            directory.mkdir()
            anyio.run(build, directory, shape)
            size = sum(path.stat().st_size for path in directory.glob("log-*")) / 1e9
            took = first_batch(folder / "run", directory, shape)
            allowed = RESTART_FLOOR_S + RESTART_S_PER_GB * size
            print(f"{shape.groups} {shape.name} groups, {size:.3f} GB: first batch of a new daemon after {took:.2f} s")
            if took > allowed:
                failures.append(f"{shape.name}: the first batch took {took:.2f} s, {allowed:.2f} are allowed")
            print(HEADER)
            for measured in anyio.run(measure, directory, shape):
                print(measured.line(), flush=True)
                if measured.worst > LIMIT_MS:
                    failures.append(f"{shape.name}, {measured.name}: {measured.worst:.2f} ms in {measured.worst_name}")
    for failure in failures:
        print(f"state-scale: TOO SLOW: {failure}", file=sys.stderr)
    print(f"state-scale: {'failed' if failures else f'every callback took less than {LIMIT_MS:g} ms of CPU time'}")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
