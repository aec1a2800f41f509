"""Snapshots, compaction and restart of a state with many finished groups; against unpickling the same groups.

The state is built and measured by ``scripts/torture/state-scale``'s own program: every callback of the event loop, by
the CPU time of its thread. A restart is a real daemon's, from its start (imports apart, which both sides have done) to
the first batch in a client's hands. The pickle holds the samples as lists in dictionaries, as buffers that are pickled
do; its groups are read one after the other and let go of, as a tenth of them: ten thousand do not fit into 16 GB so.
"""

from __future__ import annotations

import gc
import pickle
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import anyio

from tests.bench.measure import Taken, cpu, cpu_of, cpu_ratio, exponent, interleave, wall, wall_ratio, watched
from tests.bench.result import Figure, Goal, Options, Result, Unavailable
from tests.bench.work import SAMPLES, STANDARD, Maker
from tests.torture.daemon import ForkedDaemon, imported, prepare
from tests.torture.scale import Measured, Shape, build, measure

SIZES = (1_000, 3_000, 10_000)
QUICK_SIZES = (200, 600, 2_000)
SHARE_UNPICKLED = 10
BYTES_A_GROUP = 125_000
ROUNDS = 5


def restart(folder: Path, directory: Path, shape: Shape) -> Taken:
    """From the word to begin to the first batch."""
    changes: dict[str, Any] = {
        "rollout": {"n_samples_per_prompt": shape.samples},
        "run": {"state_dir": str(directory)},
    }
    run = folder / f"run-{time.monotonic_ns()}"
    daemon = ForkedDaemon(prepare(run, **changes), settings=lambda: None)
    try:
        before, began = cpu_of(daemon.pid), time.perf_counter()
        daemon.go()
        talk = daemon.connect()
        if talk is None:
            raise Unavailable(f"the daemon did not start: {daemon.stderr[-500:]}")
        talk.ask("get_batch", timeout_s=60)
        taken = Taken(time.perf_counter() - began, cpu_of(daemon.pid) - before)
        talk.close()
        return taken
    finally:
        daemon.close()


def write_pickle(path: Path, groups: int) -> None:
    maker = Maker(STANDARD)
    with path.open("wb") as file:
        for i in range(groups):
            samples = []
            for j in range(SAMPLES):
                tokens, logprobs, text = maker.columns(SAMPLES * i + j)
                sample = {"index": SAMPLES * i + j, "tokens": tokens.tolist(), "rollout_log_probs": logprobs.tolist()}
                samples.append(sample | {"loss_mask": [1] * len(tokens), "response": text, "reward": 1.0})
            pickle.dump(samples, file)


def unpickle(path: Path, groups: int) -> Taken:
    gc.disable()  # as one would, loading millions of objects
    try:
        with path.open("rb") as file, watched() as watch:
            for _ in range(groups):
                assert len(pickle.load(file)) == SAMPLES
    finally:
        gc.enable()
    return Taken(SHARE_UNPICKLED * watch.wall_s, SHARE_UNPICKLED * watch.cpu_s)


def run(options: Options) -> Result:
    result = Result("snapshot", "Restart to the first batch; snapshots", "a restart", "groups of 8 x 1,024 tokens")
    imported()
    sizes = QUICK_SIZES if options.quick else SIZES
    room = shutil.disk_usage(options.folder).free
    if room < 2.5 * sizes[-1] * BYTES_A_GROUP:
        raise Unavailable(f"{room >> 20} MiB are free in {options.folder.parent}; set TMPDIR to where there is more")
    worst: list[tuple[int, Measured]] = []
    for groups in sizes:
        folder = options.folder / str(groups)
        directory, pickled = folder / "state", folder / "groups.pickle"
        directory.mkdir(parents=True)
        shape = Shape("standard", groups, SAMPLES, STANDARD.tokens)
        anyio.run(build, directory, shape)
        write_pickle(pickled, groups // SHARE_UNPICKLED)
        turns = {
            "restart": partial(restart, folder, directory, shape),
            "unpickling": partial(unpickle, pickled, groups // SHARE_UNPICKLED),
        }
        rounds = interleave(turns, min(options.rounds, ROUNDS))
        result.figures += [Figure(name, groups, wall(taken), cpu(taken)) for name, taken in rounds.items()]
        if groups == sizes[-1]:
            what = f"unpickling, of a restart to the first batch, {groups:,} groups"
            result.goals.append(Goal(f"{what} (CPU)", cpu_ratio(rounds, "unpickling", "restart"), " x", at_least=5))
            result.goals.append(Goal(f"{what} (wall)", wall_ratio(rounds, "unpickling", "restart"), " x"))
        phases = anyio.run(measure, directory, shape)
        worst.append((groups, max(phases, key=lambda phase: phase.worst)))
        gc.unfreeze()
        shutil.rmtree(folder)
    groups, phase = worst[-1]
    what = f"longest callback, {groups:,} groups ({phase.name})"
    result.goals.append(Goal(what, phase.worst, " ms of CPU", at_most=5))
    result.goals.append(Goal("the same by the wall", phase.worst_wall, " ms"))
    slope = exponent([(f.size, f.cpu_us) for f in result.figures if f.contender == "restart"])
    callbacks = exponent([(groups, phase.worst) for groups, phase in worst])
    result.growth = (
        f"CPU time of a restart grows as groups^{slope:.2f}, the longest callback as groups^{callbacks:.2f},"
        f" from {sizes[0]:,} to {sizes[-1]:,}"
    )
    return result
