"""Cut every file of a state directory at every length and flip random bits: found, named, never used.

Run it by ``scripts/torture/state-damage``.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio

from orchestrator.core.ledger.events import Dropped, LeaseAcked, VersionSet
from orchestrator.errors import StateError
from orchestrator.state import StateStore
from orchestrator.state.recovery import Recovery, recover
from tests.support.state_histories import SIZES, act, facts, opened
from tests.torture.daemon import scratch
from tests.torture.model import Violation, must

HELP = """Two state directories are made, each by a random history of which every moment is remembered: a log without a
useful snapshot, and one with two snapshots, compacted frames and a log after them. Then each of their files is cut at
every length, and random bits are flipped, one damage at a time. The restart has to come up, at a moment that was,
without any group that differs from what it was, and has to name what was lost; the restart after it has to find the
same, and no further damage."""


@dataclass
class State:
    """A directory, what it holds undamaged, and every moment of its history, as :func:`without` gives it."""

    name: str
    directory: Path
    expected: dict[str, Any]
    moments: list[dict[str, Any]]
    outcomes: Counter[str] = field(default_factory=Counter)

    def files(self) -> list[Path]:
        return sorted(path for path in self.directory.iterdir() if path.name != "reserve")


def without(moment: dict[str, Any], gone: set[int]) -> str:
    """A moment without some groups, in a form that can be compared: what is dropped and run again is left out."""
    sources = {}
    for name, state in moment["sources"].items():
        kept = {key: value for key, value in state.items() if key not in ("rerun", "dropped")}
        for key in ("in_flight", "ready"):
            kept[key] = {index: value for index, value in state[key].items() if int(index) not in gone}
        sources[name] = kept
    leases = {}
    for step, shares in moment["leases"].items():
        left = [[g for g in groups if g[0] not in gone] for _, groups in shares]
        if any(left):
            leases[step] = left
    unarchived = {
        key: {index: value for index, value in groups.items() if int(index) not in gone}
        for key, groups in moment["unarchived"].items()
    }
    return json.dumps({**moment, "sources": sources, "leases": leases, "unarchived": unarchived}, sort_keys=True)


async def plain_log(folder: Path, seed: int, segment_bytes: int = 4096) -> State:
    """Segments from the first record on, and the snapshot of the empty beginning."""
    directory = folder / "log"
    rng = random.Random(seed)
    store = await StateStore.open(directory_of(directory), SIZES, segment_bytes=segment_bytes)
    moments = [facts(store.ledger)]
    async with anyio.create_task_group() as tasks:
        await tasks.start(store.run)
        for _ in range(45):
            act(store, rng)
            moments.append(facts(store.ledger))
        await store.written()
        tasks.cancel_scope.cancel()
    return State("log", directory, moments[-1], moments)


async def with_snapshots(folder: Path, seed: int) -> State:
    """Two snapshots, frames that were moved, leases, partial rollouts, and a log after them; copied while it ran."""
    directory, copy = folder / "running", folder / "snapshots"
    rng = random.Random(seed)
    moments: list[dict[str, Any]] = []
    async with opened(directory_of(directory), segment_bytes=4096) as store:
        moments.append(facts(store.ledger))

        def step(count: int) -> None:
            for _ in range(count):
                act(store, rng)
                moments.append(facts(store.ledger))

        for _ in range(5):
            step(40)
            for batch in list(store.ledger.leases.batches)[2:]:
                store.record(LeaseAcked(batch, 0))
                moments.append(facts(store.ledger))
            for state in store.ledger.sources.values():
                for index in list(state.ready)[3:]:
                    store.record(Dropped(state.name, index, "stale", [3], rerun=True))
                    moments.append(facts(store.ledger))
            await store.snapshot()
            await store.compact()
        step(15)
        await store.written()
        shutil.copytree(directory, copy)
    return State("snapshots", copy, moments[-1], moments)


def directory_of(path: Path) -> Path:
    path.mkdir()
    return path


class Trial:
    """One damage at a time, in a copy."""

    def __init__(self, state: State, folder: Path) -> None:
        self.state = state
        self.copy = folder / "copy"
        self._moments: dict[frozenset[int], set[str]] = {}

    def run(self, path: Path, data: bytes, what: str, *, again: bool) -> None:
        """Put ``data`` in place of the file's bytes, restart, and check.

        Raises:
            Violation: it was not found, not named, or did harm.
        """
        shutil.copytree(self.state.directory, self.copy, ignore=shutil.ignore_patterns("reserve"))
        try:
            (self.copy / path.name).write_bytes(data)
            before = {p.name: p.stat().st_size for p in self.copy.iterdir()}
            try:
                ledger, found = recover(self.copy, SIZES, "fresh")
            except StateError as error:
                must(re.search(r"is of format \d+, this version reads", str(error)), f"refused: {error}")
                must(before == {p.name: p.stat().st_size for p in self.copy.iterdir()}, "changed and refused")
                self.state.outcomes["refused as of another format"] += 1
                return
            lost = {(g.source, g.group_index) for g in ledger.unarchived.groups() if g.damage is not None}
            outcome = self._judge(facts(ledger), found, lost, path, len(data))
            self.state.outcomes[outcome] += 1
            if again:
                self._again(facts(ledger))
        except Violation as error:
            raise Violation(f"{self.state.name}/{path.name}, {what}: {error}") from None
        finally:
            shutil.rmtree(self.copy)

    def _judge(self, now: dict[str, Any], found: Recovery, lost: set[tuple[str, int]], path: Path, size: int) -> str:
        """``lost``: groups that were trained on, and are missing in the archive."""
        dropped = lost | {(drop.source, drop.group_index) for drop in found.drops}
        gone = {index for _, index in dropped}
        named = " ".join(found.problems)
        for source, index in dropped:
            must(f"group {index} of {source} (" in named, f"group {index} is not named")
        must(
            without(now, gone) in self._moments_without(frozenset(gone)),
            f"a state that never was; problems: {found.problems}",
        )
        if without(now, gone) == without(self.state.expected, gone):
            if gone:
                return "groups lost and named"
            return "found and named, nothing lost" if found.problems else "not needed, nothing lost"
        if not found.problems:
            # a log that ends earlier, between two records, is what an earlier crash leaves: nothing tells them apart
            last = max(p.name for p in self.state.files() if p.name.startswith("log-"))
            must(path.name == last and size < path.stat().st_size, "records were lost and nothing was said")
            return "ends earlier, as after an earlier crash"
        return "cut off and named"

    def _moments_without(self, gone: frozenset[int]) -> set[str]:
        if gone not in self._moments:
            self._moments[gone] = {without(moment, set(gone)) for moment in self.state.moments}
        return self._moments[gone]

    def _again(self, expected: dict[str, Any]) -> None:
        """A daemon goes on from there, ends without a snapshot, and its next start finds the same."""

        async def go_on() -> dict[str, Any]:
            store = await StateStore.open(self.copy, SIZES, segment_bytes=4096)
            must(facts(store.ledger) == expected, "a second restart found something else")
            store.record(VersionSet(10_000))
            await store._writer.flush()
            await store._writer.aclose()
            return facts(store.ledger)

        expected = anyio.run(go_on)
        ledger, found = recover(self.copy, SIZES, "fresh")
        must(facts(ledger) == expected, "what was written after the damage was not found")
        harmless = (
            "nothing was lost",
            "before it was archived",
        )  # what waits for the archive is named until it is there
        must(all(any(words in p for words in harmless) for p in found.problems), f"damage again: {found.problems}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="state-damage", description=HELP, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="of the histories and of the bits")
    parser.add_argument("--cut-every", type=int, default=1, metavar="BYTES", help="lengths to cut at")
    parser.add_argument("--bits", type=int, default=1000, help="random bits to flip, in each of the two states")
    parser.add_argument("--again-every", type=int, default=10, metavar="N", help="go on and restart after every N-th")
    parser.add_argument("--keep", type=Path, help="where the state is made, and stays if something is wrong")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    began = time.monotonic()
    cuts = 0
    with scratch(options.keep, "state-damage") as folder:
        states = [anyio.run(make, folder, options.seed) for make in _makers()]
        for state in states:
            rng = random.Random(f"{options.seed} {state.name}")
            trial = Trial(state, folder)
            cuts += _cut(trial, options)
            _flip(trial, options, rng)
    for state in states:
        print(f"  {state.name}:")
        for outcome, count in state.outcomes.most_common():
            print(f"    {count:6} {outcome}")
    print(
        f"state-damage: seed {options.seed}, {cuts} cuts and {len(states) * options.bits} bits, all found or harmless,"
        f" {time.monotonic() - began:.0f} s"
    )
    return 0


def _makers() -> list[Callable[[Path, int], Any]]:
    return [plain_log, with_snapshots]


def _cut(trial: Trial, options: argparse.Namespace) -> int:
    count = 0
    for path in trial.state.files():
        data = path.read_bytes()
        for size in range(options.seed % options.cut_every, len(data), options.cut_every):
            trial.run(path, data[:size], f"cut to {size} bytes", again=count % options.again_every == 0)
            count += 1
    return count


def _flip(trial: Trial, options: argparse.Namespace, rng: random.Random) -> None:
    files = trial.state.files()
    sizes = [path.stat().st_size for path in files]
    for i in range(options.bits):
        path = rng.choices(files, sizes)[0]
        data = bytearray(path.read_bytes())
        at, bit = rng.randrange(len(data)), rng.randrange(8)
        data[at] ^= 1 << bit
        trial.run(path, bytes(data), f"bit {bit} of byte {at} flipped", again=i % options.again_every == 0)


if __name__ == "__main__":
    sys.exit(main())
