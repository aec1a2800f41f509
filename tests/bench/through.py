"""Finished groups on their way through: from the lists of an engine's answer to a trainer's arrays.

Against ZeroMQ and Redis streams, whose producers begin with the same lists, and where asked for by name, at one size,
against what trainers use today. All that takes part counts: producer, server, consumer and what they start; all make
columns of a group from lists in the same way, and look at every byte in the end; ours also logs to a disk, leases and
keeps the mixture. In ours a task in a real daemon puts finished groups in whenever there is
room. At one size the same is measured with the scripted engine and all stages in between (pool, generation in pieces
of 16 tokens, scoring, filter); what the engine's own invention of tokens costs is measured beside it and taken off.
"""

from __future__ import annotations

import os
import select
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

import anyio

from orchestrator.client import RolloutClient
from orchestrator.engines import SamplingParams
from orchestrator.engines.port import GenerationRequest
from orchestrator.engines.scripted import ScriptedEngine
from tests.bench.daemons import FedDaemon, daemon, write_config
from tests.bench.handout import look_at, read_columns
from tests.bench.measure import Taken, cpu, cpu_ratio, exponent, family, interleave, wall, watched, watched_families
from tests.bench.peers import OPTIONAL, PROGRAMS, USUAL_PEERS, optional_python, peers_python
from tests.bench.result import Figure, Goal, Options, Result, Unavailable
from tests.bench.work import GROUPS_A_BATCH, PROMPT_TOKENS, SAMPLES, Shape

SIZES = (64, 1024, 4096)
STANDARD_SIZE = 1024
BATCHES_A_TURN = {64: 6, 1024: 2, 4096: 1}
PARTS = {
    "zmq": ("produce", "consume"),
    "redis": ("serve", "produce", "consume"),
    "reverb": ("serve", "produce", "consume"),
    "ray": ("both",),
    "transferqueue": ("both",),
    "atropos": ("serve", "produce", "consume"),
}
"""The processes of each peer; what these start themselves counts too."""
OPTIONAL_GOALS = {"reverb": 3.0, "ray": 5.0, "transferqueue": 10.0, "atropos": 100.0}
SETTLE_S = 0.02
DEADLINE_S = 120.0


WEIGHTS: dict[str, float | str] = {"easy": "lambda step: 0.75", "hard": "lambda step: 0.25"}
COUNTS = {"easy": 24, "hard": 8}


def take(client: RolloutClient, batches: int, tokens: int) -> None:
    for _ in range(batches):
        batch = client.get_batch(timeout_s=60)
        assert read_columns(batch) == GROUPS_A_BATCH * SAMPLES * tokens
        look_at(batch)
        client.ack(batch.lease)


def until(condition: Callable[[], bool]) -> None:
    """Wait until it is so.

    Raises:
        Unavailable: it did not come to be.
    """
    end = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > end:
            raise Unavailable("the daemon did not come to rest")
        time.sleep(SETTLE_S)


@contextmanager
def fed(folder: Path, tokens: int) -> Iterator[Callable[[], Taken]]:
    """Turns of the daemon that finished groups are put into: as many come in as are taken."""
    batches = BATCHES_A_TURN[tokens]
    config = write_config(folder, weights=WEIGHTS, sampling={"max_new_tokens": tokens})
    shape, held = Shape("", tokens, 0 if tokens == SIZES[0] else 4096), batches + 4
    entered, enter = os.pipe()
    with (
        daemon(config, FedDaemon, shape=shape, batches=held, counts=COUNTS, entered=enter) as pid,
        RolloutClient(folder / "sock", connect_timeout_s=60) as client,
        open(entered, "rb", buffering=0) as full,
    ):
        os.close(enter)

        def turn() -> Taken:
            with watched(pid) as watch:
                take(client, batches, tokens)
                _await_bytes(full, batches)
            return watch.taken(batches * GROUPS_A_BATCH * SAMPLES)

        _await_bytes(full, held)
        yield turn


@contextmanager
def generating(folder: Path, tokens: int) -> Iterator[Callable[[], Taken]]:
    """Turns of the daemon with its scripted engine: as much is generated as is taken."""
    folder.mkdir()
    prompt = "p" * (PROMPT_TOKENS - 8)
    lines = (f'{{"prompt": "{prompt}{i:08}", "label": "x"}}\n' for i in range(2000))
    (folder / "prompts.jsonl").write_text("".join(lines))
    engine = {"kind": "scripted", "time_scale": 0.0, "max_in_flight": 64}
    config = write_config(
        folder, weights=WEIGHTS, engines=[engine], rollout={"chunk_tokens": None}, sampling={"max_new_tokens": tokens}
    )
    with daemon(config) as pid, RolloutClient(folder / "sock", connect_timeout_s=60) as client:

        def is_quiet() -> bool:
            return not client.status()["generation"]["in_flight"]

        def turn() -> Taken:
            with watched(pid) as watch:
                take(client, 1, tokens)
                until(is_quiet)
            return watch.taken(GROUPS_A_BATCH * SAMPLES)

        take(client, 1, tokens)
        until(is_quiet)
        yield turn


def engine_alone(tokens: int) -> Callable[[], Taken]:
    """Turns of the scripted engine by itself, its chunks thrown away."""
    engine = ScriptedEngine(name="e", time_scale=0.0)
    prompt = list(b"p" * PROMPT_TOKENS)
    samples = 4 * SAMPLES

    async def generate() -> Taken:
        with watched() as watch:
            for i in range(samples):
                request = GenerationRequest(
                    request_id=str(i),
                    tokens=prompt,
                    generated=0,
                    max_new_tokens=tokens,
                    sampling=SamplingParams(max_new_tokens=tokens),
                    sample_index=i,
                )
                await engine.generate(request, lambda *_: None)
        return watch.taken(samples)

    return lambda: anyio.run(generate, backend="asyncio", backend_options={"use_uvloop": True})


@contextmanager
def peer(name: str, python: str, folder: Path, tokens: int) -> Iterator[Callable[[], Taken]]:
    """Turns of a peer's producer and consumer, with its server if it has one.

    Raises:
        Unavailable: it cannot be had here.
    """
    address = str(folder / f"{name}-{tokens}")
    shape = [str(tokens), str(SAMPLES), "0" if tokens == SIZES[0] else "4096"]
    with ExitStack() as stack:
        pids, log = [], stack.enter_context(open(f"{address}.log", "wb")) if name in OPTIONAL else None
        watch_turn = watched_families if name in OPTIONAL else watched

        def start(*arguments: str) -> subprocess.Popen[str]:
            process = subprocess.Popen(
                [python, str(PROGRAMS / f"{name}_peer.py"), *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if arguments[0] != "serve" else subprocess.DEVNULL,
                stderr=log,
                text=True,
                process_group=0,  # Ctrl-C is not for it
            )
            stack.callback(_end_family if name in OPTIONAL else _end, process)
            pids.append(process.pid)
            return process

        if "serve" in PARTS[name]:
            _await(address, start("serve", address))
        ends = [start(role, address, *shape) for role in PARTS[name] if role != "serve"]
        for end in ends:
            _hear(end, "ready")

        def turn() -> Taken:
            groups = (1 if name == "atropos" else BATCHES_A_TURN[tokens]) * GROUPS_A_BATCH
            try:
                with watch_turn(*pids) as watch:
                    for end in ends:
                        assert end.stdin is not None
                        end.stdin.write(f"{groups}\n")
                        end.stdin.flush()
                    for end in ends:
                        _hear(end, "done")
            except OSError as why:
                raise Unavailable(f"a process of it is gone ({why})") from why
            return watch.taken(groups * SAMPLES)

        yield turn


def _await_bytes(pipe: FileIO, count: int) -> None:
    while count:
        if not select.select([pipe], [], [], DEADLINE_S)[0] or not (came := pipe.read(count)):
            raise Unavailable("the daemon did not fill its buffers")
        count -= len(came)


def _await(path: str, server: subprocess.Popen[Any]) -> None:
    end = time.monotonic() + 60
    while not os.path.exists(path):
        if time.monotonic() > end or server.poll() is not None:
            raise Unavailable(f"a peer's server did not start: {server.args}")
        time.sleep(SETTLE_S)


def _hear(process: subprocess.Popen[Any], word: str) -> None:
    assert process.stdout is not None
    if not select.select([process.stdout], [], [], DEADLINE_S)[0]:
        raise Unavailable(f"a peer did not answer within {DEADLINE_S:g} s: {process.args}")
    if process.stdout.readline().strip() != word:
        raise Unavailable(f"a peer ended: {process.args}")


def _end_family(process: subprocess.Popen[Any]) -> None:
    """Let it end what it started, and kill what is left of that."""
    begun = family(process.pid) - {process.pid}
    assert process.stdin is not None
    with suppress(BrokenPipeError):
        process.stdin.close()
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=20)
    for pid in begun:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    _end(process)


def _end(process: subprocess.Popen[Any]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with suppress(BrokenPipeError):  # of what it did not read any more
                stream.close()


def run(options: Options) -> Result:
    result = Result("through", "Finished groups, from lists to a trainer's arrays", "a sample", "tokens a response")
    names, python = usual(options, result.missing)
    for tokens in SIZES:
        folder = options.folder / str(tokens)
        folder.mkdir()
        with ExitStack() as stack:
            turns = {name: stack.enter_context(peer(name, python, folder, tokens)) for name in names}
            if tokens == STANDARD_SIZE:
                turns |= optional(options, stack, folder, result.missing)
            turns["orchestrator"] = stack.enter_context(fed(folder, tokens))
            if tokens == STANDARD_SIZE:
                turns["scripted engine alone"] = engine_alone(tokens)
                turns["with the scripted engine"] = stack.enter_context(generating(folder / "all", tokens))
            rounds = interleave(turns, options.rounds, lose=partial(lose_peer, result.missing, tokens))
        result.figures += [Figure(name, tokens, wall(taken), cpu(taken)) for name, taken in rounds.items()]
        if tokens == STANDARD_SIZE:
            result.goals += goals(rounds)
    points = [(figure.size, figure.cpu_us) for figure in result.figures if figure.contender == "orchestrator"]
    result.growth = (
        f"CPU time a sample grows as tokens^{exponent(points):.2f}, from {SIZES[0]} to {SIZES[-1]} tokens"
        f" ({exponent(points[1:]):.2f} from {SIZES[1]} on)"
    )
    return result


def usual(options: Options, missing: list[str]) -> tuple[list[str], str]:
    """Those of the usual peers that take part, and their interpreter; ``missing`` says why they cannot be had here."""
    names = [name for name in USUAL_PEERS if name in options.peers and name in PARTS]
    try:
        return names, peers_python(tuple(names)) or ""
    except Unavailable as why:
        missing.append(f"{', '.join(names)}: {why}")
        return [], ""


def lose_peer(missing: list[str], tokens: int, name: str, why: Unavailable) -> None:
    """Go on without a peer that is gone, and with nobody else."""
    if name not in PARTS:
        raise why
    missing.append(f"{name} with {tokens:,} tokens: {why}")


def optional(options: Options, stack: ExitStack, folder: Path, missing: list[str]) -> dict[str, Callable[[], Taken]]:
    """Turns of the large peers that were asked for; ``missing`` says why one cannot be had here."""
    turns = {}
    for name in (name for name in OPTIONAL if name in options.peers):
        with ExitStack() as own:
            try:
                turns[name] = own.enter_context(peer(name, optional_python(name), folder, STANDARD_SIZE))
                turns[name]()
            except Unavailable as why:
                turns.pop(name, None)
                log = folder / f"{name}-{STANDARD_SIZE}.log"
                last = log.read_text(errors="replace").strip().splitlines()[-1:] if log.exists() else []
                missing.append(f"{name}: {'; '.join([str(why), *last])}")
            else:
                stack.enter_context(own.pop_all())
    return turns


def goals(rounds: dict[str, list[Taken]]) -> list[Goal]:
    found = [
        Goal(f"CPU of {name}, of ours", cpu_ratio(rounds, name, "orchestrator"), " x", at_least=bound)
        for name, bound in OPTIONAL_GOALS.items()
        if name in rounds
    ]
    if "redis" in rounds:
        what = "CPU of Redis streams and msgpack, of ours"
        found.append(Goal(what, cpu_ratio(rounds, "redis", "orchestrator"), " x", at_least=1.5))
    if "zmq" in rounds:
        what = "CPU of ours, of raw ZeroMQ"
        found.append(Goal(what, cpu_ratio(rounds, "orchestrator", "zmq"), " x", at_most=1.5))
    pairs = zip(rounds["with the scripted engine"], rounds["scripted engine alone"], strict=True)
    stages = statistics.median(a.cpu - b.cpu for a, b in pairs)
    found.append(Goal("all stages, without the engine's own invention", stages, " µs of CPU a sample"))
    return found
