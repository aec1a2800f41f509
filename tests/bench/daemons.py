"""Real daemons for benchmarks: the command's own, and one that begins with finished groups in its buffers."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import sys
import time
import traceback
from array import array
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel

from orchestrator.concurrency.broadcast import Broadcast
from orchestrator.config import Config, load_config
from orchestrator.core.ledger.groups import GroupFacts
from orchestrator.core.mixture.plan import forecast
from orchestrator.core.weights.forms import parse_weight
from orchestrator.core.weights.table import WeightTable
from orchestrator.daemon.assembly import Parts
from orchestrator.daemon.daemon import Daemon
from orchestrator.daemon.opening import Opened
from orchestrator.frames import encode_group
from orchestrator.logs import configure_logging
from orchestrator.records import Group, Prompt, Sample, SampleStatus
from orchestrator.state import StateStore
from tests.bench.result import Unavailable
from tests.bench.work import GROUPS_A_BATCH, PROMPT_TOKENS, SAMPLES, Maker, Shape, demand

ROWS = 4096
DESCRIPTORS = 1 << 17
LISTEN_DEADLINE_S, LISTEN_INTERVAL_S = 120.0, 0.01


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def write_config(folder: Path, *, weights: dict[str, float | str], **sections: Any) -> Path:
    """A config whose sources are named by ``weights``; sections are laid over."""
    prompts = folder / "prompts.jsonl"
    if not prompts.exists():
        prompts.write_text("".join(json.dumps({"prompt": f"prompt {i}=", "label": str(i)}) + "\n" for i in range(ROWS)))
    config: dict[str, Any] = {
        "run": {"name": "bench", "state_dir": "state"},
        "rollout": {"rollout_batch_size": GROUPS_A_BATCH, "n_samples_per_prompt": SAMPLES},
        "engines": [{"kind": "scripted", "time_scale": 0.0}],
        "data_sources": [{"name": n, "prompts": {"path": "prompts.jsonl"}, "reward": "contains"} for n in weights],
        "data_source_weights": list(weights.values()),
        "consumer": {"socket": "sock"},
        "status": {"http": None},
        "logging": {"file": "log.jsonl"},
    }
    for name, section in sections.items():
        config[name] = config[name] | section if isinstance(section, dict) and name in config else section
    path = folder / "config.yaml"
    path.write_text(json.dumps(config))
    return path


class FilledDaemon(Daemon):
    """A daemon whose state has, when it starts, the finished groups of the first ``batches`` batches of its plan.

    They were put there as finished groups always are, and are in memory as bytes of their own, as those of a daemon
    that has generated them.
    """

    def __init__(self, config: Config, *args: Any, shape: Shape, batches: int, **options: Any) -> None:
        super().__init__(config, *args, **options)
        self._shape, self._batches = shape, batches

    async def _open(self, stack: AsyncExitStack, changed: Broadcast, replan: Broadcast) -> Opened:
        opened = await super()._open(stack, changed, replan)
        store = opened.store
        maker = Maker(self._shape)
        async with anyio.create_task_group() as tasks:
            await tasks.start(store.run)
            for source, count in needed(opened.config, self._batches).items():
                for _ in range(count):
                    event = store.ledger.next_launch(source, SAMPLES, lambda _, position: position)
                    assert event is not None
                    store.record(event)
                    store.store_group(maker.frame(source, event.group_index, event.prompt_index, event.epoch))
                    await store.written()
            tasks.cancel_scope.cancel()
        return opened


class FedDaemon(Daemon):
    """A daemon whose buffers are filled with finished groups whenever there is room: ``batches`` batches of them.

    Each group is made of Python's lists, as an engine's answer gives them, and goes the way of any finished group from
    there on. That is more than the plan asks for, so that the producers have nothing to do, but for what they launch
    before it is there. ``counts`` are the groups of each source in a batch. A byte is written to the pipe ``entered``
    for as many groups as a batch has: nobody has to ask for the status, which would be measured too.
    """

    def __init__(
        self, config: Config, *args: Any, shape: Shape, batches: int, counts: dict[str, int], entered: int
    ) -> None:
        super().__init__(config, *args)
        self._groups = {source: batches * count for source, count in counts.items()}
        self._prompt_tokens = list(range(PROMPT_TOKENS))
        self._entered, self._told = entered, 0
        self._samples = [
            (tokens.tolist(), logprobs.tolist(), text) for tokens, logprobs, text in map(Maker(shape).columns, range(8))
        ]

    async def _supervise(self, parts: Parts, store: StateStore, changed: Broadcast) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._feed, store, changed)
            await super()._supervise(parts, store, changed)
            tasks.cancel_scope.cancel()

    async def _feed(self, store: StateStore, changed: Broadcast) -> None:
        while True:
            change = changed.next()
            for source, groups in self._groups.items():
                while len(store.ledger.source(source).ready) < groups:
                    self._store(store, source)
                    await anyio.lowlevel.checkpoint()
            self._tell(store)
            await change.wait()

    def _tell(self, store: StateStore) -> None:
        states = store.ledger.sources.values()
        batches = sum(state.handed_out + len(state.ready) for state in states) // GROUPS_A_BATCH
        os.write(self._entered, b"." * (batches - self._told))
        self._told = batches

    def _store(self, store: StateStore, source: str) -> None:
        event = store.ledger.next_launch(source, SAMPLES, lambda _, position: position)
        assert event is not None
        store.record(event)
        samples = []
        for i, (tokens, logprobs, text) in enumerate(self._samples):
            sample = Sample(index=event.first_sample + i, status=SampleStatus.COMPLETED, reward=1.0, text=text)
            sample.extend(tokens, logprobs, 0)
            samples.append(sample)
        prompt = Prompt(source, event.prompt_index, event.epoch, "prompt", label="y")
        group = Group(source, event.group_index, prompt, array("i", self._prompt_tokens), samples)
        store.store_group(encode_group(group), GroupFacts.of(group))


def needed(config: Config, batches: int) -> dict[str, int]:
    """Groups of each source in the first batches."""
    names = config.source_names
    table = WeightTable(names, [parse_weight(weight) for weight in config.data_source_weights])
    size = config.rollout.rollout_batch_size
    return demand(forecast(table, step=0, carry={}, size=size, horizon=batches, active=names))


def in_child(work: Callable[[], None]) -> int:
    """Run something in a forked process that ends with it; returns its pid. What it prints goes to standard error.

    Ctrl-C is not for it: whoever began it ends it.
    """
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        status = 1
        os.setpgid(0, 0)
        try:
            work()
            status = 0
        except BaseException:  # noqa: BLE001 - this process ends here, whatever it was
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return pid


def has_ended(pid: int) -> bool:
    """Of a process that this one started and has not waited for."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


@contextmanager
def process(work: Callable[[], None]) -> Iterator[int]:
    """A forked process; ended at the end of the block."""
    pid = in_child(work)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def allow_descriptors() -> None:
    """As many as this process may have: each request to an engine takes one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(DESCRIPTORS, hard) if hard > 0 else DESCRIPTORS, hard))


@contextmanager
def daemon(config: Path, kind: Callable[..., Daemon] = Daemon, **options: Any) -> Iterator[int]:
    """A daemon as ``orchestrator run`` starts it, on an event loop of uvloop, once it listens; its pid.

    Raises:
        Unavailable: it ended before, or took too long.
    """

    def work() -> None:
        allow_descriptors()
        loaded = load_config(config)
        logs = configure_logging(file=loaded.logging.file, level=loaded.logging.level)
        try:
            anyio.run(kind(loaded, logs, **options).run, backend="asyncio", backend_options={"use_uvloop": True})
        finally:
            logs.close()

    with process(work) as pid:
        _until_it_listens(pid, config.parent)
        yield pid


def _until_it_listens(pid: int, folder: Path) -> None:
    end = time.monotonic() + LISTEN_DEADLINE_S
    while not (folder / "sock").exists():
        if has_ended(pid) or time.monotonic() > end:
            log = folder / "log.jsonl"
            last = log.read_text(errors="replace").splitlines()[-1:] if log.exists() else []
            raise Unavailable("; ".join(["a daemon did not come to listen", *last]))
        time.sleep(LISTEN_INTERVAL_S)
