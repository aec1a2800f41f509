"""What campaigns share: what a trainer took, checked sample by sample, and the waits of a test on a real daemon."""

from __future__ import annotations

import argparse
import logging
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import structlog

from orchestrator.client import Batch, RolloutClient
from orchestrator.errors import BatchTimeout

DEADLINE_S: Final = 60.0
"""Only a campaign that hangs meets it."""

POLL_S: Final = 0.01


class Failure(AssertionError):
    """What a campaign found."""


def must(condition: object, problem: object) -> None:
    """Raise ``Failure`` unless it is so; not an ``assert``, which a program may be run without."""
    if not condition:
        raise Failure(problem)


@dataclass(frozen=True)
class Taken:
    """One sample as the trainer got it, ``versions`` and ``loss_mask`` one entry a token."""

    source: str
    group: int
    prompt: list[int]
    index: int
    tokens: list[int]
    logprobs: list[float]
    versions: list[int]
    loss_mask: list[int]
    metadata: dict[str, Any]
    status: str

    @property
    def cuts(self) -> int:
        """How often its generation was interrupted."""
        return int(self.metadata.get("pieces", 1)) - 1


@dataclass
class Trainer:
    """Takes batches, and holds the daemon to this: nothing is handed out twice, but a lease that was not acknowledged,
    and that is the same to the byte."""

    samples: list[Taken] = field(default_factory=list)
    groups: dict[int, tuple[str, int, int]] = field(default_factory=dict)
    batches: int = 0
    _open: dict[str, list[bytes]] = field(default_factory=dict)
    _acknowledged: set[str] = field(default_factory=set)

    def take(self, client: RolloutClient, *, timeout_s: float = DEADLINE_S, ack: bool = True) -> Batch:
        """One batch; raises ``BatchTimeout``."""
        batch = client.get_batch(timeout_s=timeout_s)
        frames = [bytes(group.frame.buffer) for group in batch.groups]
        must(batch.lease not in self._acknowledged, f"{batch.lease} came again after its acknowledgement")
        if batch.lease in self._open:
            must(self._open[batch.lease] == frames, f"{batch.lease} came again, and it is another")
        else:
            self._open[batch.lease] = frames
            self._note(batch)
        if ack:
            client.ack(batch.lease)
            self._acknowledged.add(batch.lease)
        return batch

    def take_ready(self, client: RolloutClient, *, ack: bool = True) -> None:
        """What is there."""
        try:
            while True:
                self.take(client, timeout_s=0.0, ack=ack)
                if not ack:
                    return
        except BatchTimeout:
            return

    @property
    def cuts(self) -> int:
        return sum(sample.cuts for sample in self.samples)

    def _note(self, batch: Batch) -> None:
        self.batches += 1
        for group in batch.groups:
            header = group.frame.header
            prompt = (group.source, header["epoch"], header["prompt_index"])
            must(group.group_index not in self.groups, f"group {group.group_index} was handed out twice")
            must(prompt not in self.groups.values(), f"the prompt {prompt} was handed out twice")
            self.groups[group.group_index] = prompt
            for sample in group.samples:
                versions = [version for version, count in sample.versions for _ in range(count)]
                must(sample.logprobs is not None, f"sample {sample.index} has no log-probabilities")
                self.samples.append(
                    Taken(
                        source=group.source,
                        group=group.group_index,
                        prompt=group.frame.column("prompt_tokens").tolist(),
                        index=sample.index,
                        tokens=sample.response_tokens.tolist(),
                        logprobs=sample.logprobs.tolist(),  # type: ignore[union-attr]
                        versions=versions,
                        loss_mask=sample.loss_mask.tolist(),
                        metadata=sample.metadata,
                        status=str(sample.status),
                    )
                )


def check_accounts(status: dict[str, Any], *, dropped: int = 0) -> None:
    """Every group that was launched is in one place, and none was dropped beyond what is meant."""
    for name, source in status["sources"].items():
        groups = source["groups"]
        places = {key: groups[key] for key in ("in_flight", "buffered", "leased", "acknowledged", "dropped")}
        must(groups["launched"] == sum(places.values()), f"{name}: {groups['launched']} launched, but {places}")
        must(groups["dropped"] <= dropped, f"{name} dropped: {source['dropped']}")


def check_mask(sample: Taken, *, masks: bool) -> None:
    """With the option, tokens older than the version of the last one are masked, and nothing else ever is."""
    last = sample.versions[-1]
    expected = [int(not masks or version == last) for version in sample.versions]
    must(sample.loss_mask == expected, f"sample {sample.index}: mask {sample.loss_mask} of {sample.versions}")
    must(
        len(sample.versions) == len(sample.tokens), f"sample {sample.index}: versions of {len(sample.versions)} tokens"
    )
    must(sample.versions == sorted(sample.versions), f"sample {sample.index}: its versions go back: {sample.versions}")


def until(condition: Callable[[], Any], what: object) -> Any:
    """Ask again and again until it is so; returns what it said."""
    deadline = time.monotonic() + DEADLINE_S
    while not (answer := condition()):
        must(time.monotonic() < deadline, f"never came: {what() if callable(what) else what}")
        time.sleep(POLL_S)
    return answer


def engines(client: RolloutClient) -> dict[str, dict[str, Any]]:
    return {engine["name"]: engine for engine in client.engines()}


# -- as programs ------------------------------------------------------------------------------------------------------


def arguments(description: str, **options: Any) -> argparse.Namespace:
    """Of a program whose options are numbers with these defaults, and ``--seed``; only its own words are printed."""
    parser = argparse.ArgumentParser(description=description)
    for name, default in options.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=None, help="of all that is random; default: another one each time")
    found = parser.parse_args()
    if found.seed is None:
        found.seed = random.SystemRandom().randrange(1 << 31)
    print(f"seed {found.seed}", flush=True)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    return found


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder that is kept when the body fails."""
    folder = Path(tempfile.mkdtemp(prefix="campaign-"))
    try:
        yield folder
    except BaseException:
        print(f"FAILED; what there is to see is in {folder}", flush=True)
        raise
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()
