"""Handing batches out: ``get_batch`` and ``ack`` by the shipped client, against a bare socket and JSON lists.

The daemon is a real one with everything on (weights, leases, state log, log lines, metrics); its finished groups are
there before the clock runs, and its engine has nothing left to generate. The bare socket sends the same bytes one way,
by ``sendmsg`` from memory of their own into one buffer that is used again. Columns are numpy arrays at the end; in
turns of their own, both also look at every byte, as a trainer would, so that nothing is won by putting work off.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from orchestrator.client import Batch, RolloutClient
from tests.bench.daemons import FilledDaemon, daemon, process, write_config
from tests.bench.measure import Taken, cpu, cpu_ratio, exponent, interleave, wall, wall_ratio, watched
from tests.bench.peers import orjson_peer
from tests.bench.result import Figure, Goal, Options, Result, Unavailable
from tests.bench.work import GROUPS_A_BATCH, LONG, SAMPLES, SHAPES, STANDARD, Maker, Shape

OURS, BARE, JSON, LOOKED_AT = "orchestrator", "bare socket", "JSON lists by orjson", ", all looked at"
BATCHES_A_TURN = {"small": 8, "standard": 6, "long": 2}
JSON_BATCHES_A_TURN = 1
LARGE_COLUMNS = 4
"""Of a group, in so many pieces the bare socket's bytes are looked at, too."""

CURVES: dict[str, float | str] = {
    "easy": "lambda step: 0.9 - 0.8 * min(step / 40, 1.0)",
    "hard": "lambda step: 0.1 + 0.8 * min(step / 40, 1.0)",
}


def read_columns(batch: Batch) -> int:
    """Have every column of every group as an array; returns the tokens."""
    tokens = 0
    for group in batch.groups:
        tokens += len(group.response_tokens)
        for column in (group.prompt_tokens, group.offsets, group.logprobs, group.loss_mask, group.rewards):
            assert column is not None
    return tokens


def look_at(batch: Batch) -> None:
    """Every byte of every large column."""
    for group in batch.groups:
        assert group.logprobs is not None
        for column in (group.response_tokens, group.logprobs, group.loss_mask, group.frame.column("text")):
            look_at_bytes(column.view(np.uint8))


def look_at_bytes(data: np.ndarray) -> int:
    """Read all of it, eight bytes at a time."""
    return int(np.bitwise_xor.reduce(data[: len(data) & ~7].view(np.uint64)))


def take(client: RolloutClient, batches: int, shape: Shape, pid: int, *, looks: bool) -> Taken:
    with watched(pid) as watch:
        for _ in range(batches):
            batch = client.get_batch(timeout_s=60)
            assert read_columns(batch) == GROUPS_A_BATCH * SAMPLES * shape.tokens
            if looks:
                look_at(batch)
            client.ack(batch.lease)
    return watch.taken(batches)


@contextmanager
def ours(folder: Path, shape: Shape, turns: int) -> Iterator[dict[str, Callable[[], Taken]]]:
    """Turns of the daemon and the shipped client, without and with looking at what came."""
    batches = BATCHES_A_TURN[shape.name]
    whole = 2 * turns * batches
    rollout = {"num_rollout": whole, "over_sampling_batch_size": 2 * whole * GROUPS_A_BATCH}
    config = write_config(folder, weights=CURVES, rollout=rollout, sampling={"max_new_tokens": shape.tokens})
    with (
        daemon(config, FilledDaemon, shape=shape, batches=whole) as pid,
        RolloutClient(folder / "sock", connect_timeout_s=120) as client,
    ):
        client.status()
        yield {
            OURS: lambda: take(client, batches, shape, pid, looks=False),
            OURS + LOOKED_AT: lambda: take(client, batches, shape, pid, looks=True),
        }


@contextmanager
def bare(shape: Shape, batches: int, turns: int) -> Iterator[dict[str, Callable[[], Taken]]]:
    """Turns of a bare socket: a byte asks for a batch, whose frames come one way."""
    maker = Maker(shape)
    here, there = socket.socketpair()
    size = len(b"".join(maker.frames(GROUPS_A_BATCH)))
    buffer = memoryview(bytearray(size))
    buffer[:] = bytes(size)
    pieces = np.array_split(np.frombuffer(buffer, np.uint8), GROUPS_A_BATCH * LARGE_COLUMNS)

    def serve() -> None:
        here.close()
        frames = [list(maker.frames(GROUPS_A_BATCH)) for _ in range(2 * batches * turns)]
        for parts in frames:
            if not there.recv(1):
                return
            rest = [memoryview(part) for part in parts]
            while rest:
                sent = there.sendmsg(rest)
                while rest and sent >= len(rest[0]):
                    sent -= len(rest.pop(0))
                if sent:
                    rest[0] = rest[0][sent:]
        there.recv(1)

    def turn(*, looks: bool) -> Taken:
        with watched(pid) as watch:
            for _ in range(batches):
                here.sendall(b"g")
                received = 0
                while received < size:
                    came = here.recv_into(buffer[received:])
                    if not came:
                        raise Unavailable("the bare socket's sender is gone")
                    received += came
                for piece in pieces if looks else ():
                    look_at_bytes(piece)
        return watch.taken(batches)

    with process(serve) as pid:
        there.close()
        yield {BARE: lambda: turn(looks=False), BARE + LOOKED_AT: lambda: turn(looks=True)}
    here.close()


@contextmanager
def json_lists(shape: Shape) -> Iterator[Callable[[], Taken]]:
    """Turns of a server that keeps samples as lists and answers with JSON, by orjson on both sides."""
    here, there = socket.socketpair()
    maker = Maker(shape)

    def serve() -> None:
        here.close()
        columns = [[maker.columns(SAMPLES * i + j) for j in range(SAMPLES)] for i in range(GROUPS_A_BATCH)]
        groups = [
            {
                "prompt_tokens": list(range(256)),
                "samples": [
                    {
                        "tokens": tokens.tolist(),
                        "logprobs": logprobs.tolist(),
                        "loss_mask": [1] * len(tokens),
                        "text": text,
                        "reward": 1.0,
                    }
                    for tokens, logprobs, text in group
                ],
            }
            for group in columns
        ]
        orjson_peer.serve(there, groups)

    def turn() -> Taken:
        with watched(pid) as watch:
            for _ in range(JSON_BATCHES_A_TURN):
                assert orjson_peer.take(here) == GROUPS_A_BATCH * SAMPLES * shape.tokens
        return watch.taken(JSON_BATCHES_A_TURN)

    with process(serve) as pid:
        there.close()
        yield turn
    here.close()


def measure(options: Options, shape: Shape) -> dict[str, list[Taken]]:
    turns, folder = options.rounds + 1, options.folder / shape.name
    folder.mkdir()
    with ExitStack() as stack:
        batches = BATCHES_A_TURN[shape.name]
        contenders = stack.enter_context(bare(shape, batches, turns))
        if "orjson" in options.peers and shape is STANDARD:
            contenders[JSON] = stack.enter_context(json_lists(shape))
        contenders |= stack.enter_context(ours(folder, shape, turns))
        return interleave(contenders, options.rounds)


def run(options: Options) -> Result:
    result = Result("handout", "Handing a batch out", "a batch", "tokens a response")
    for shape in SHAPES:
        rounds = measure(options, shape)
        result.figures += [Figure(name, shape.tokens, wall(taken), cpu(taken)) for name, taken in rounds.items()]
        bound = {"standard": 50.0, "long": 80.0}.get(shape.name)
        speed = f"{shape.name}: of a bare socket's speed"
        result.goals.append(Goal(f"{speed} (CPU)", 100 * cpu_ratio(rounds, BARE, OURS), " %", at_least=bound))
        result.goals.append(Goal(f"{speed} (wall)", 100 * wall_ratio(rounds, BARE, OURS), " %"))
        looked_at = 100 * cpu_ratio(rounds, BARE + LOOKED_AT, OURS + LOOKED_AT)
        result.goals.append(Goal(f"{speed}, all looked at (CPU)", looked_at, " %"))
        if JSON in rounds:
            faster = cpu_ratio(rounds, JSON, OURS)
            result.goals.append(Goal("times as fast as JSON lists by orjson (CPU)", faster, " x", at_least=40))
            result.goals.append(
                Goal("times as fast as JSON lists by orjson (wall)", wall_ratio(rounds, JSON, OURS), " x")
            )
    points = [(figure.size, figure.cpu_us) for figure in result.figures if figure.contender == OURS]
    result.growth = (
        f"CPU time a batch grows as tokens^{exponent(points):.2f} from {SHAPES[0].tokens} to {LONG.tokens} tokens"
        f" ({exponent(points[1:]):.2f} from {STANDARD.tokens} on)"
    )
    return result
