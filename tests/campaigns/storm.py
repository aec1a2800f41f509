"""A real daemon under interruptions at random moments, until every prompt has ended.

Interruptions are version changes, pauses, deaths and stalls of engines, and the daemon's own ends: a drain, SIGTERM,
SIGKILL. Moments are counted in tokens, not in seconds.
"""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from orchestrator.client import RolloutClient
from orchestrator.errors import BatchTimeout, RunFinished
from tests.campaigns.checks import Taken, Trainer, check_accounts, check_mask, engines, must, until
from tests.campaigns.farm import Farm
from tests.support.daemon_process import DaemonProcess, daemon

SAMPLES: Final = 2
CUTS: Final = ("version abort", "pause abort", "pause finish")
ENDS: Final = ("sigterm", "sigkill", "drain")
FAKES: Final = ("engine killed", "engine stalled")
RARE: Final = (*ENDS, *FAKES, "pause finish")


@dataclass
class Change:
    """The version in force from ``end`` on; before ``begin`` the one before it was.

    Only a change that is bracketed by a pause is exact: at any other one, what has arrived and was not read yet carries
    the new version.
    """

    begin: float
    end: float
    version: int
    is_bracketed: bool = True


@dataclass
class Storm:
    """One daemon under interruptions.

    Args:
        config: of the daemon.
        kinds: of interruptions.
        seed: of what happens when.
        gap_tokens: that are generated between two interruptions, on average.
        cuts: as many generations are interrupted at least, if there are prompts enough (:func:`rows`).
        farms: the processes of the engines.
    """

    config: Path
    kinds: Sequence[str]
    seed: int
    gap_tokens: float
    cuts: int
    farms: Sequence[Farm] = ()
    trainer: Trainer = field(default_factory=Trainer)
    changes: list[Change] = field(default_factory=lambda: [Change(-math.inf, -math.inf, 0)])
    kills: list[float] = field(default_factory=list)
    events: Counter[str] = field(default_factory=Counter)
    status: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._rng = random.Random(self.seed)

    def run(self) -> None:
        """Until all prompts have ended."""
        todo = self._kinds()
        with daemon(self.config) as process:
            client = process.connect()
            try:
                while self._calm(client):
                    kind = next(todo)
                    self.events[kind] += 1
                    client = self._happen(kind, process, client)
            finally:
                client.close()

    def _kinds(self) -> Iterator[str]:
        """Each kind once in any order, then at random; the daemon's own ends are rarer."""
        often = [kind for kind in self.kinds if kind not in RARE]
        yield from self._rng.sample(self.kinds, len(self.kinds))
        yield from self._rng.sample(often, len(often))
        weights = [1 if kind in RARE else 5 for kind in self.kinds]
        while True:
            yield self._rng.choices(self.kinds, weights)[0]

    @property
    def _batches_allowed(self) -> float:
        """In the first round, one for each kind that has happened: the prompts last until all have, however long each
        takes on a busy machine."""
        happened = sum(self.events[kind] > 0 for kind in self.kinds)
        return happened if happened < len(self.kinds) else math.inf

    def _take(self, client: RolloutClient, *, ack: bool = True) -> None:
        """What is there, and allowed; raises ``RunFinished``."""
        with suppress(BatchTimeout):
            while self.trainer.batches < self._batches_allowed:
                self.trainer.take(client, timeout_s=0.0, ack=ack)
                if not ack:
                    return

    def _is_full(self, client: RolloutClient) -> bool:
        """Whether nothing more is generated until a batch is taken that is not allowed yet."""
        if self.trainer.batches < self._batches_allowed:
            return False
        return not any(source["groups"]["in_flight"] for source in client.status()["sources"].values())

    def _calm(self, client: RolloutClient) -> bool:
        """Train for a random number of tokens; whether anything is left to do after that."""
        wanted = self._rng.expovariate(1.0) * self.gap_tokens * (0.3 if self._batches_allowed < math.inf else 1.0)
        begin = sum(engine["tokens"] for engine in client.engines())

        def is_over() -> str | None:
            try:
                self._take(client)
            except RunFinished:
                self.status = client.status()
                return "finished"
            found = client.engines()
            if any(engine["state"] == "outdated" for engine in found):
                self._bracketed(client, "abort")  # it is there again: the trainer says what it holds
            is_enough = sum(engine["tokens"] for engine in found) - begin >= wanted
            return "long enough" if is_enough or self._is_full(client) else None

        return bool(until(is_over, lambda: client.status()) != "finished")

    # -- what happens --------------------------------------------------------------------------------------------------

    def _happen(self, kind: str, process: DaemonProcess, client: RolloutClient) -> RolloutClient:
        match kind:
            case "version abort":
                with self._changing(is_bracketed=False) as version:
                    client.set_policy_version(version, "abort")
            case "pause abort":
                self._bracketed(client, "abort")
            case "pause finish":
                self._bracketed(client, "finish")
            case "engine killed":
                farm = self._rng.choice(self.farms)
                farm.kill()
                self._calm(client)
                farm.start()
            case "engine stalled":
                self._stall(client)
            case _:
                return self._end(kind, process, client)
        return client

    def _changing(self, *, is_bracketed: bool = True) -> _Changing:
        return _Changing(self.changes, is_bracketed)

    def _bracketed(self, client: RolloutClient, mode: Any) -> None:
        must(client.pause_generation(mode, timeout_s=30.0)["in_flight"] == 0, "a pause that is not quiet")
        with self._changing() as version:
            client.set_policy_version(version)
        client.continue_generation()

    def _stall(self, client: RolloutClient) -> None:
        """One engine says nothing more until the daemon has noticed."""
        farm = self._rng.choice(self.farms)
        [name] = farm.servers
        if engines(client)[name]["state"] != "up":
            return
        before = engines(client)[name]
        farm.order(name, "stall")

        def is_noticed() -> bool:
            now = engines(client)[name]
            try:  # one that has nothing to do cannot be seen to stall
                self._take(client) if now["in_flight"] else self.trainer.take_ready(client)
            except RunFinished:
                return True
            return now["stalled"] + now["late"] > before["stalled"] + before["late"] or now["state"] != "up"

        until(is_noticed, lambda: f"a stall of {name}: {client.status()}")
        farm.order(name, "go")

    def _end(self, kind: str, process: DaemonProcess, client: RolloutClient) -> RolloutClient:
        if kind == "sigkill":
            with suppress(RunFinished):
                self._take(client, ack=self._rng.random() < 0.5)
            self.kills.append(time.monotonic())
            process.kill()
        else:
            if kind == "drain":
                client.drain()
            client.close()
            must(process.stop() == 0, f"the daemon ended badly: {process.stderr}")
        client.close()
        return process.start().connect()

    # -- what came of it -----------------------------------------------------------------------------------------------

    def check(self, prompts: int, problem: Callable[[Taken], str | None], *, masks: bool) -> None:
        """Every prompt ended once, with what the engines say that they produced; raises ``Failure``."""
        check_accounts(self.status)
        must(len(self.trainer.groups) == prompts, f"{len(self.trainer.groups)} of {prompts} prompts were handed out")
        must(len(self.trainer.samples) == prompts * SAMPLES, f"{len(self.trainer.samples)} samples")
        must(len({sample.index for sample in self.trainer.samples}) == prompts * SAMPLES, "a sample came twice")
        for sample in self.trainer.samples:
            found = problem(sample)
            must(found is None, f"sample {sample.index} of {sample.source}: {found}; {sample.metadata}")
            check_mask(sample, masks=masks)
        for kind in self.kinds:
            must(self.events[kind], f"no {kind!r} happened")
        must(self.trainer.cuts >= self.cuts, f"only {self.trainer.cuts} generations were interrupted")

    def __str__(self) -> str:
        happened = ", ".join(f"{count} {kind}" for kind, count in sorted(self.events.items()))
        return (
            f"{self.trainer.cuts} generations were interrupted; {len(self.trainer.groups)} prompts ended; {happened};"
            f" versions up to {self.changes[-1].version}"
        )


class _Changing:
    """Notes when a version came into force."""

    def __init__(self, changes: list[Change], is_bracketed: bool) -> None:
        self._changes = changes
        self._is_bracketed = is_bracketed

    def __enter__(self) -> int:
        version = self._changes[-1].version + 1
        self._changes.append(Change(time.monotonic(), math.inf, version, self._is_bracketed))
        return version

    def __exit__(self, *_: object) -> None:
        self._changes[-1].end = time.monotonic()
