"""Four engines, three of them bad, against the healthy one alone; both at the same time, so that a busy machine slows
both.

One is dead (its port is closed), one resets half of its connections, one answers 30 s late. Run it by
``scripts/torture/bad-engines``.
"""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from orchestrator.client import RolloutClient
from tests.campaigns.checks import Trainer, arguments, check_accounts, must, scratch
from tests.campaigns.farm import Farm, Server
from tests.campaigns.script import problem_of
from tests.support.daemon_process import daemon, write_config

LENGTH: Final = (20, 80)
LIMIT: Final = 80
SLOTS: Final = 32
LATE_S: Final = 30.0
FIRST_BATCHES: Final = 5
LEAST_SHARE: Final = 0.7

HOW: Final = {"length": LENGTH, "tokens_per_s": 200.0, "first_token_s": 0.05}
"""Responses of 0.15 to 0.5 s."""


@dataclass(frozen=True)
class Outcome:
    """Samples per second of the healthy engine alone and of all four, and the status of these at the end."""

    alone: float
    together: float
    status: dict[str, Any]
    trainers: tuple[Trainer, Trainer]
    resets: int

    @property
    def share(self) -> float:
        return self.together / self.alone


@contextmanager
def closed_port() -> Iterator[int]:
    """A port on which nobody listens, and nobody else can."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


def config(folder: Path, engines: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    return write_config(
        folder,
        rollout={"rollout_batch_size": 8, "n_samples_per_prompt": 4},
        sampling={"max_new_tokens": LIMIT},
        engines=engines,
    )


def train(client: RolloutClient, batches: int) -> tuple[Trainer, float]:
    """Take batches as a trainer does; samples per second, the first batches not counted."""
    trainer, began, before = Trainer(), time.monotonic(), 0
    for i in range(batches):
        if i == FIRST_BATCHES:
            began, before = time.monotonic(), len(trainer.samples)
        trainer.take(client)
    return trainer, (len(trainer.samples) - before) / (time.monotonic() - began)


def run(folder: Path, *, batches: int, seed: int, only_generations: bool) -> Outcome:
    """Both runs.

    Args:
        folder: for both.
        batches: to take of each.
        seed: of the resets.
        only_generations: the late engine answers everything else in time, its probes too.
    """
    late = {"rates": {"latency": 1.0}, "latency_s": [LATE_S, LATE_S], "only": ["/generate"] if only_generations else []}
    alone = Server(name="healthy", kind="sglang", how=HOW)
    healthy = Server(name="healthy", kind="sglang", how=HOW)
    resets = Server(name="resets", kind="openai", how=HOW, proxy={"rates": {"reset": 0.25, "reset_in_reply": 0.25}})
    assert resets.proxy is not None
    resets.proxy["seed"] = seed
    slow = Server(name="late", kind="sglang", how=HOW, proxy=late)
    with ExitStack() as stack:
        dead = stack.enter_context(closed_port())
        stack.enter_context(Farm(alone))
        farm = stack.enter_context(Farm(healthy, resets, slow))
        four = [server.config(max_in_flight=SLOTS) for server in (healthy, resets, slow)]
        four.insert(0, {"kind": "sglang", "name": "dead", "url": f"http://127.0.0.1:{dead}", "max_in_flight": SLOTS})
        one = stack.enter_context(daemon(config(folder / "alone", [alone.config(max_in_flight=SLOTS)])))
        all_ = stack.enter_context(daemon(config(folder / "together", four)))
        clients = [stack.enter_context(process.connect()) for process in (one, all_)]
        with ThreadPoolExecutor(2) as threads:
            (first, rate_alone), (second, rate_together) = threads.map(lambda client: train(client, batches), clients)
        counts = farm.order("resets", "counts")
        return Outcome(
            rate_alone,
            rate_together,
            clients[1].status(),
            (first, second),
            counts.get("reset", 0) + counts.get("reset_in_reply", 0),
        )


NAMED: Final = {
    "dead": r"(?i)connect",
    "resets": r"(?i)reset|disconnected|connect",
    "late": r"come much later|no answer",
}
"""What the status says of each."""


def check(outcome: Outcome) -> None:
    """Raises ``Failure``."""
    check_accounts(outcome.status)
    for trainer in outcome.trainers:
        for sample in trainer.samples:
            problem = problem_of(sample.prompt, sample.tokens, sample.logprobs, length=LENGTH, limit=LIMIT)
            must(problem is None, f"sample {sample.index}: {problem}")
    engines = {engine["name"]: engine for engine in outcome.status["engines"]}
    for name, words in NAMED.items():
        must(re.search(words, str(engines[name]["last_error"])), f"what is said of {name}: {engines[name]}")
    must(engines["dead"]["state"] == "down", engines["dead"])
    must(engines["healthy"]["state"] == "up", engines["healthy"])
    must(engines["healthy"]["failed"] == 0, engines["healthy"])
    must(outcome.resets > 0, "nothing was reset")
    must(
        outcome.share >= LEAST_SHARE,
        f"{outcome.together:.1f} samples/s are {outcome.share:.0%} of the {outcome.alone:.1f} of the healthy engine"
        f" alone; {engines}",
    )


def main() -> None:
    options = arguments(__doc__ or "", batches=30, rounds=4)
    for number in range(options.rounds):
        with scratch() as folder:
            outcome = run(folder, batches=options.batches, seed=options.seed + number, only_generations=number % 2 == 0)
            print(f"round {number}: alone {outcome.alone:.1f} samples/s, with three bad ones {outcome.together:.1f}")
            for engine in outcome.status["engines"]:
                ends = f"{engine['completed']:5} done, {engine['failed']} failed, {engine['late']} late"
                print(f"  {engine['name']:8} {engine['state']:8} {ends}: {engine['last_error']}")
            check(outcome)
            print(f"  share {outcome.share:.0%}: ok", flush=True)


if __name__ == "__main__":
    main()
