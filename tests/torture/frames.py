"""A million frames that no client means, at a daemon that a trainer is at work with: nothing crashes, nothing changes.

Run it by ``scripts/torture/frames``.
"""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import anyio
import anyio.abc

from orchestrator.client import Batch, RolloutClient
from orchestrator.frames import PREFIX_BYTES, parse_header, parse_prefix
from tests.campaigns.checks import arguments, must, scratch, until
from tests.support.daemon_process import DaemonProcess, daemon, write_config
from tests.support.hostile_frames import KINDS, Maker, World, recorded, requests_in
from tests.support.protocol_client import ProtocolClient, Refused

GROWTH_LIMIT_MB: Final = 50.0
CONNECTIONS: Final = 6
"""At a time, of the one that sends."""

AT_ONCE: Final = 30
"""Requests that are not answered yet, below the limit of 32, as some of a malformed tail come on top."""

ANSWER_DEADLINE_S: Final = 30.0

KEPT: Final = ("step", "policy_version", "next_group_index", "plan", "leases", "problems")
KEPT_OF_A_SOURCE: Final = [
    "weight",
    "paused",
    "exhausted",
    "carry",
    "debt",
    "cursor",
    "groups",
    "dropped",
    "handed_out",
    "overtakings",
    "buffered_bytes",
]
"""Of the status: what no frame may change."""


@dataclass
class Tally:
    """What was sent and what came back."""

    left: int
    frames: int = 0
    malformed: int = 0
    connections: int = 0
    unanswered: int = 0
    answers: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Outcome:
    """The daemon before and after."""

    tally: Tally
    left_out: int
    seconds: float
    rss_mb: tuple[float, float, float]  # before, highest, after
    descriptors: tuple[int, int]
    status: tuple[dict[str, Any], dict[str, Any]]
    errors: list[str]


def memory_mb(pid: int, field_: str = "VmRSS") -> float:
    text = Path(f"/proc/{pid}/status").read_text()
    return int(next(line.split()[1] for line in text.splitlines() if line.startswith(field_))) / 1024


def converse(client: RolloutClient) -> None:
    """Every method once, as trainers use them; in the end everything is as it was but for three steps."""
    batch = client.get_batch(timeout_s=30)
    client.nack(batch.lease)
    client.ack(client.get_batch(timeout_s=30).lease)
    client.set_policy_version(1)
    client.pause_generation(mode="finish", timeout_s=20)
    client.continue_generation()
    client.set_weight("easy", "lambda step: 0.7 + 0 * step")
    client.set_weight("easy", None)
    client.pause("hard")
    client.resume("hard")
    client.engines()
    client.sources()
    client.save("one")
    client.checkpoints()
    client.verify_checkpoints("one")
    held = [client.get_batch(timeout_s=30).lease for _ in range(2)]
    client.cancel(client.request_batch(timeout_s=30))  # a third one waits for an acknowledgement: none is on its way
    client.status()
    for lease in held:
        client.ack(lease)


def check_methods(process: DaemonProcess) -> None:
    """Every method of the daemon is known here; one that is not would be sent nothing."""
    with ProtocolClient(str(process.socket)) as client:
        try:
            client.request("none")
        except Refused as error:
            listed = str(error).partition("use one of ")[2].split(", ")
            must(sorted(listed) == sorted(KINDS), f"the daemon has the methods {listed}, here are {list(KINDS)}")


def kept(status: dict[str, Any]) -> dict[str, Any]:
    """What no frame may change; a clock is not among it."""
    sources = {name: {key: source[key] for key in KEPT_OF_A_SOURCE} for name, source in status["sources"].items()}
    leases = [{key: value for key, value in lease.items() if key != "held_s"} for lease in status["leases"]]
    return {key: status[key] for key in KEPT} | {"leases": leases, "sources": sources}


def settled(client: RolloutClient) -> dict[str, Any]:
    """The status once nothing is in flight: as many groups as are planned for are buffered."""

    def look() -> dict[str, Any] | None:
        status = client.status()
        sources = status["sources"].values()
        is_quiet = all(s["groups"]["in_flight"] == 0 and s["groups"]["buffered"] >= s["wanted"] for s in sources)
        return status if is_quiet and any(s["wanted"] for s in sources) else None

    return until(look, "a daemon that is done producing")  # type: ignore[no-any-return]


# -- sending -----------------------------------------------------------------------------------------------------------


async def send_all(path: Path, maker: Maker, rng: random.Random, tally: Tally, on_progress: Any) -> None:
    async def work() -> None:
        while tally.left > 0:
            await talk(path, maker, rng, tally)
            on_progress()

    async with anyio.create_task_group() as tasks:
        for _ in range(CONNECTIONS):
            tasks.start_soon(work)


async def talk(path: Path, maker: Maker, rng: random.Random, tally: Tally) -> None:
    """One connection: some rounds of requests in vain, each of which is answered; then something malformed."""
    tally.connections += 1
    async with await anyio.connect_unix(path) as stream:
        answers = Answers(stream)
        for _ in range(rng.choice((0, 0, 0, 1, 1, 2))):
            requests = maker.requests(min(rng.randrange(1, AT_ONCE + 1), max(1, tally.left)))
            tally.left -= len(requests)
            tally.frames += len(requests)
            await stream.send(b"".join(requests))
            for _ in requests:
                tally.answers[await answers.code()] += 1
        tail = maker.malformed()
        tally.left -= 1
        tally.frames += 1
        tally.malformed += 1
        await tell_last(stream, answers, tail, tally)


async def tell_last(stream: anyio.abc.ByteStream, answers: Answers, tail: bytes, tally: Tally) -> None:
    """Send what is malformed; a daemon that has seen that it is ends the connection by itself, and says why."""
    asked, is_bad = requests_in(tail)
    with contextlib.suppress(anyio.BrokenResourceError):
        await stream.send(tail)
        if not is_bad:
            await stream.send_eof()
    codes = [code async for code in answers]
    tally.answers.update(codes)
    if is_bad:
        must("bad_frame" in codes, f"no bad_frame, but {codes}, after {tail[:200]!r}")
    must(len(codes) <= len(asked) + is_bad, f"{codes} after {tail[:200]!r}")
    tally.unanswered += len(asked) + is_bad - len(codes)


class Answers:
    """The answers on a connection; each has to be a frame of the protocol."""

    def __init__(self, stream: anyio.abc.ByteStream) -> None:
        self._stream = stream
        self._data = bytearray()

    def __aiter__(self) -> Answers:
        return self

    async def __anext__(self) -> str:
        try:
            return await self.code()
        except (anyio.EndOfStream, anyio.BrokenResourceError):
            must(not self._data, f"the daemon ended within a frame: {bytes(self._data[:200])!r}")
            raise StopAsyncIteration from None

    async def code(self) -> str:
        """The error code of the next answer, or ``result``."""
        await self._have(PREFIX_BYTES)
        prefix = parse_prefix(self._data)
        await self._have(prefix.frame_bytes)
        header = parse_header(bytes(self._data[PREFIX_BYTES : PREFIX_BYTES + prefix.header_bytes]))
        del self._data[: prefix.frame_bytes]
        must({"id"} < set(header) <= {"id", "result", "error"}, f"an answer with {header}")
        code = header["error"]["code"] if "error" in header else "result"
        must(code != "internal", f"a defect: {header}")
        return str(code)

    async def _have(self, size: int) -> None:
        while len(self._data) < size:
            with anyio.fail_after(ANSWER_DEADLINE_S):
                self._data += await self._stream.receive()


# -- the whole ---------------------------------------------------------------------------------------------------------


def world_of(status: dict[str, Any], batch: Batch) -> World:
    return World(
        leases=frozenset({batch.lease}),
        sources=frozenset(status["sources"]),
        engines=frozenset(engine["name"] for engine in status["engines"]),
        checkpoints=frozenset({"one"}),
        policy_version=status["policy_version"],
    )


def run(folder: Path, *, count: int, seed: int) -> Outcome:
    """Record a conversation, then send that many frames beside a trainer that holds a batch."""
    config = write_config(folder, rollout={"rollout_batch_size": 4, "lookahead": 2})
    with daemon(config) as process:
        process.connect().close()
        check_methods(process)
        recording = recorded(process.socket, folder / "recorded")
        with recording as conversation, RolloutClient(folder / "recorded") as client:
            converse(client)
        with process.connect() as trainer:
            outcome = _send(process, trainer, conversation, count, seed)
            must(process.stop() == 0, process.stderr)
            return outcome


def _send(process: DaemonProcess, trainer: RolloutClient, conversation: list[bytes], count: int, seed: int) -> Outcome:
    batch = trainer.get_batch(timeout_s=30)
    before = settled(trainer)
    rng = random.Random(seed)
    maker = Maker(rng, conversation, world_of(before, batch))
    pid = before["run"]["pid"]
    tally = Tally(left=count)
    rss, descriptors, began = memory_mb(pid), len(os.listdir(f"/proc/{pid}/fd")), time.monotonic()
    highest, told = rss, began

    def progress() -> None:
        nonlocal highest, told
        if time.monotonic() - told < 1:
            return
        told, highest = time.monotonic(), max(highest, memory_mb(pid))

    anyio.run(send_all, process.socket, maker, rng, tally, progress)
    seconds = time.monotonic() - began
    until(lambda: len(os.listdir(f"/proc/{pid}/fd")) <= descriptors, "closed descriptors")
    after, rss_after = settled(trainer), memory_mb(pid)
    trainer.ack(batch.lease)
    must(trainer.get_batch(timeout_s=30).step == batch.step + 1, "the next batch is of the next step")
    errors = [line["message"] for line in process.log if line["log.level"] in ("error", "critical")]
    memory = (rss, max(highest, rss_after), rss_after)
    fds = (descriptors, len(os.listdir(f"/proc/{pid}/fd")))
    return Outcome(tally, maker.left_out, seconds, memory, fds, (before, after), errors)


def check(outcome: Outcome) -> None:
    """Raises ``Failure``."""
    before, after = outcome.status
    for key, value in kept(before).items():
        must(value == kept(after)[key], f"{key} was {value} and is {kept(after)[key]}")
    growth = outcome.rss_mb[1] - outcome.rss_mb[0]
    must(growth < GROWTH_LIMIT_MB, f"memory grew by {growth:.1f} MB")
    must(not outcome.errors, outcome.errors)


def report(outcome: Outcome) -> None:
    tally, (before, highest, after) = outcome.tally, outcome.rss_mb
    print(f"frames          {tally.frames:>10}   of these malformed {tally.malformed}, {outcome.left_out} left out")
    print(f"connections     {tally.connections:>10}")
    for code, number in tally.answers.most_common():
        print(f"  {code:<20} {number:>9}")
    print(f"  given up at the end  {tally.unanswered:>7}")
    print(f"seconds         {outcome.seconds:>10.1f}   {tally.frames / outcome.seconds:.0f} frames/s")
    print(f"memory, MB      {before:>10.1f} before, {highest:.1f} highest, {after:.1f} after: {highest - before:+.1f}")
    print(f"descriptors     {outcome.descriptors[0]:>10} before, {outcome.descriptors[1]} after")


def main() -> None:
    options = arguments(__doc__ or "", count=1_000_000)
    with scratch() as folder:
        outcome = run(folder, count=options.count, seed=options.seed)
        report(outcome)
        check(outcome)
    print("frames: the state is as it was, and the trainer goes on")


if __name__ == "__main__":
    main()
