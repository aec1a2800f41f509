"""A day of a run in minutes: everything that happens in one, again and again, while memory and descriptors are watched.

Run it by ``scripts/torture/day``. Engines are scripted and a thousand times faster than real ones, so that a minute is
sixteen hours of them.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from orchestrator.client import RolloutClient
from orchestrator.errors import BadRequest
from tests.campaigns.checks import must
from tests.campaigns.faults import descriptors, resident_kb
from tests.support.daemon_process import DaemonProcess, daemon, write_config, write_prompts
from tests.torture.daemon import scratch

TIME_SCALE: Final = 0.001
HOURS: Final = 24.0
SOURCES: Final = ("easy", "hard", "code")
GROWTH: Final = 0.04
"""Of the resident memory over the second half of the day, of the fitted line: the noise of an allocator."""

WARM_S: Final = 30.0
"""Before that a process still fills its caches: the memory of a shorter day is told, and not judged."""

LEAST_GROWTH_KB: Final = 3000
"""Whatever the share is of: three megabytes are noise."""

LOOKS: Final = 4
"""At the descriptors, of which the fewest count."""


def config_of(folder: Path, *, turn: int = 0) -> Path:
    """The day's config; ``turn`` changes what a reload is to take over."""
    for name in SOURCES:
        if not (folder / f"{name}.jsonl").exists():
            write_prompts(folder / f"{name}.jsonl", 500, text=name)
    engine = {"kind": "scripted", "time_scale": TIME_SCALE, "length": [20, 400], "tail_sigma": 0.8}
    sources = [{"name": name, "prompts": {"path": f"{name}.jsonl"}, "reward": "contains"} for name in SOURCES]
    return write_config(
        folder,
        run={"name": "day", "seed": 1, "state_dir": "state", "keep_checkpoints": 2},
        rollout={"rollout_batch_size": 16, "n_samples_per_prompt": 4, "max_staleness": 6, "chunk_tokens": 128},
        sampling={"max_new_tokens": 512},
        engines=[
            {**engine, "name": "steady"},
            {**engine, "name": "rough", "failure_rate": 0.02, "reset_rate": 0.02, "seed": 5},
        ],
        data_sources=sources,
        data_source_weights=["lambda step: 1 - 0.9 * min(step / 400, 1)", 0.3 + 0.1 * (turn % 2), 0.2],
    )


@dataclass
class Day:
    """The trainer and the operator of a run, and what was measured."""

    folder: Path
    process: DaemonProcess
    batches: int = 0
    version: int = 0
    done: dict[str, int] = field(default_factory=dict)
    at: list[float] = field(default_factory=list)
    memory_kb: list[int] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)

    @property
    def pid(self) -> int:
        assert self.process.process is not None
        return self.process.process.pid

    def count(self, what: str) -> None:
        self.done[what] = self.done.get(what, 0) + 1

    def train(self, client: RolloutClient, batches: int) -> None:
        for _ in range(batches):
            batch = client.get_batch(timeout_s=60)
            client.ack(batch.lease)
            self.batches += 1

    # -- what happens in a day -----------------------------------------------------------------------------------------

    def happenings(self, client: RolloutClient) -> Iterator[Callable[[], None]]:
        """One after the other, for ever."""
        while True:
            yield from (
                lambda: self._version(client, "abort"),
                lambda: self._version(client, "keep"),
                lambda: self._update(client),
                lambda: self._pause(client),
                lambda: self._engine(client),
                lambda: self._save(client),
                lambda: self._reload(client),
                self._rotate,
                self._second_client,
                lambda: self._weight(client),
                lambda: self._give_back(client),
            )

    def _version(self, client: RolloutClient, mode: Any) -> None:
        self.version += 1
        client.set_policy_version(self.version, mode)
        self.count(f"version {mode}")

    def _update(self, client: RolloutClient) -> None:
        self.version += 1
        client.update_weights(f"/weights/{self.version}", self.version, rolling=self.version % 2 == 0)
        self.count("update_weights")

    def _pause(self, client: RolloutClient) -> None:
        client.pause_generation("abort", timeout_s=30)
        client.continue_generation()
        self.count("pause")

    def _engine(self, client: RolloutClient) -> None:
        engine = {"kind": "scripted", "name": "guest", "time_scale": TIME_SCALE, "length": [20, 400]}
        client.add_engine(engine)
        self.train(client, 2)
        client.remove_engine("guest")
        self.count("engine added and removed")

    def _save(self, client: RolloutClient) -> None:
        client.save(f"batch-{self.batches}")
        self.count("checkpoint")

    def _reload(self, client: RolloutClient) -> None:
        self.count("reload")
        config_of(self.folder, turn=self.done["reload"])
        must(client.reload()["changes"], "a changed config was read, and nothing had changed")

    def _rotate(self) -> None:
        log = self.folder / "log.jsonl"
        log.rename(log.with_name("log.jsonl.1"))
        self.process.signal(signal.SIGUSR1)
        self.count("log rotation")

    def _second_client(self) -> None:
        with self.process.connect() as other:
            other.status()
            try:
                other.remove_engine("nobody")
            except BadRequest:
                self.count("client that comes and goes")

    def _weight(self, client: RolloutClient) -> None:
        client.set_weight("code", 0.5)
        client.pause("hard")
        self.train(client, 1)
        client.resume("hard")
        client.set_weight("code", None)
        self.count("weight, pause, resume")

    def _give_back(self, client: RolloutClient) -> None:
        client.nack(client.get_batch(timeout_s=60).lease)
        self.count("nack")

    # -- measuring -----------------------------------------------------------------------------------------------------

    def measure(self, client: RolloutClient) -> None:
        """In a moment of quiet, so that what is held is what stays."""
        client.pause_generation("finish", timeout_s=60)
        self.at.append(time.monotonic())
        self.memory_kb.append(resident_kb(self.pid))
        looks = []
        for _ in range(LOOKS):  # a snapshot that is written just now, or a client that has just gone, stays for no two
            looks.append(descriptors(self.pid))
            client.status()
        self.descriptors.append(min(looks))
        client.continue_generation()


def live(folder: Path, seconds: float) -> Day:
    """A day of that many seconds; raises ``Failure`` where something does not hold."""
    with daemon(config_of(folder)) as process, process.connect() as client:
        day = Day(folder, process)
        happenings = day.happenings(client)
        ends, measure_at = time.monotonic() + seconds, 0.0
        while time.monotonic() < ends:
            day.train(client, 3)
            next(happenings)()
            if time.monotonic() >= measure_at:
                day.measure(client)
                measure_at = time.monotonic() + seconds / 40
        status = client.status()
        for name, source in status["sources"].items():
            groups = dict(source["groups"])
            must(groups.pop("launched") == sum(groups.values()), f"the groups of {name} do not add up: {groups}")
        must(status["state"]["fault"] is None, f"the disk failed: {status['state']['fault']}")
        day.done["tokens"] = sum(engine["tokens"] for engine in status["engines"])
        must(process.stop() == 0, f"the daemon ended badly: {process.stderr}")
        return day


def judge(day: Day) -> str:
    """Whether memory and descriptors are flat over the second half; says what they are."""
    half = len(day.at) // 2
    at, memory = np.array(day.at[half:]), np.array(day.memory_kb[half:])
    slope = float(np.polyfit(at - at[0], memory, 1)[0])
    growth, level = slope * float(at[-1] - at[0]), float(np.median(memory))
    files = day.descriptors[half:]
    report = (
        f"memory {level / 1024:.1f} MiB, {growth / 1024:+.2f} MiB by the line fitted to the second half;"
        f" descriptors {min(files)} to {max(files)}"
    )
    is_warm = day.at[half] - day.at[0] >= WARM_S
    must(
        not is_warm or growth <= max(LEAST_GROWTH_KB, GROWTH * level),
        f"the memory grows: {report}; in kB: {day.memory_kb}",
    )
    last = files[len(files) // 2 :]  # what leaks is there in each of them
    must(min(last) <= max(day.descriptors[:half]), f"descriptors grow: {day.descriptors}")
    return report


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="day", description=__doc__)
    parser.add_argument("--minutes", type=float, default=HOURS * 60 * TIME_SCALE, help="how long the day takes")
    parser.add_argument("--keep", type=Path, help="where the state is made, and stays if something is wrong")
    options = parser.parse_args(arguments)
    with scratch(options.keep, "day") as folder:
        day = live(folder, options.minutes * 60)
        report = judge(day)
    hours = options.minutes / 60 / TIME_SCALE
    print(f"{day.batches} batches; {json.dumps(day.done)}")
    print(f"day: {hours:.0f} hours of engines {1 / TIME_SCALE:g} times as fast; {report}; {os.cpu_count()} cores")
    return 0


if __name__ == "__main__":
    sys.exit(main())
