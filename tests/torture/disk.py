"""A disk that fails at any call, once or for a while, and one that is full: nothing is lost, and it ends by itself.

Run it by ``scripts/torture/state-disk``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio

from orchestrator.errors import StateError
from orchestrator.state.recovery import recover
from orchestrator.state.segments import list_segments, segment_path
from tests.support.paths import STATE_V1
from tests.support.state_histories import facts
from tests.torture.client import Gone, Refused, Talk, converse
from tests.torture.daemon import ForkedDaemon, Tracer, imported, prepare, scratch, short_cycle
from tests.torture.damage import plain_log
from tests.torture.model import SIZES, Model, Violation, must

CALLS = ("pwritev2", "pwritev", "fdatasync", "fsync", "rename", "openat", "unlink", "fallocate", "statfs")
"""What the thread that writes the state's files calls; ``write``, of snapshots, is also how it wakes the loop."""


STOPS_THE_LOG = ("pwritev2", "pwritev", "fdatasync", "openat")
"""Without these nothing new is answered: at once, or when the next segment is to be begun."""

START_CALLS = (
    "openat",
    "newfstatat",
    "getdents64",
    "read",
    "write",
    "rename",
    "truncate",
    "ftruncate",
    "fsync",
    "unlink",
)
"""What a restart calls."""

ERRORS = ("EIO", "ENOSPC")

RECOVERY_S = 8.0
"""Within which a fault has to be over once the disk is well: attempts are a second apart, on a busy machine more."""

HELP = """Part 1: strace lets the k-th call of the daemon's disk thread fail once, for every k of a cycle; the cycle has
to go to its end all the same. Part 2: every call of one kind fails for as long as strace is attached: the daemon has to
name the fault in its status and its log, to answer, and to be well again within seconds after it; or it is killed
meanwhile. Part 3: a start whose k-th call fails, or at whose k-th call it is killed, comes up or is refused with a
sentence, and the next one finds what it would have found. Part 4: a
tmpfs of 1 MiB fills up: what is held is served and acknowledged, and with more space launching goes on. After each end
the state is compared with a model of all that was reported."""


class Run:
    """One state directory, its model, and the daemons that run on it one after the other."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.folder = folder
        self.config = prepare(folder, **changes)
        self.state = folder / "state"
        self.model = Model()

    @contextlib.contextmanager
    def daemon(self, settings: Any = short_cycle) -> Iterator[ForkedDaemon]:
        """A running daemon; killed at the end, and its state checked."""
        daemon = ForkedDaemon(self.config, settings)
        try:
            daemon.go()
            yield daemon
            must(daemon.poll() is None, f"the daemon ended: {daemon.stderr[-3000:]}")
        finally:
            daemon.close()
        self.model.check(self.state)

    def errors(self) -> list[str]:
        """The messages of the log's error lines."""
        whole, _, _ = (self.folder / "log.jsonl").read_text().rpartition("\n")  # the last line may be half written
        lines = map(json.loads, whole.splitlines())
        return [line["message"] for line in lines if line["log.level"] in ("error", "warning")]


def client(daemon: ForkedDaemon) -> Talk:
    talk = daemon.connect()
    must(talk is not None, f"the daemon did not come up: {daemon.stderr[-3000:]}")
    assert talk is not None
    return talk


def fault(talk: Talk) -> str | None:
    return (talk.ask("status")[0]["state"])["fault"]  # type: ignore[no-any-return]


def wait_until_well(talk: Talk) -> float:
    """Returns the seconds until no fault is reported any more."""
    began = time.monotonic()
    while (now := fault(talk)) is not None:
        must(time.monotonic() - began < RECOVERY_S, f"still after {RECOVERY_S:g} s: {now}")
        time.sleep(0.02)
    return time.monotonic() - began


# -- the parts ---------------------------------------------------------------------------------------------------------


def count_calls(run: Run, folder: Path) -> dict[str, int]:
    with run.daemon() as daemon:
        converse(client(daemon), run.model)
    trace = folder / "trace"
    with run.daemon() as daemon:
        tracer = Tracer(daemon.disk_thread, f"trace={','.join(CALLS)}", output=trace, follow=False)
        converse(client(daemon), run.model)
        tracer.close()
    seen = Counter(re.findall(r"^(\w+)\(", trace.read_text(errors="replace"), re.MULTILINE))
    return {call: seen[call] for call in CALLS if seen[call]}


def once(run: Run, plan: list[tuple[str, str, int]]) -> str:
    """Part 1."""
    for call, error, k in plan:
        with run.daemon() as daemon:
            inject = f"inject={call}:error={error}:when={k}"
            tracer = Tracer(daemon.disk_thread, f"trace={call}", inject, follow=False)
            talk = client(daemon)
            try:
                converse(talk, run.model, batches=8)
                wait_until_well(talk)
            except (Gone, Refused, Violation) as problem:
                raise Violation(f"{call} {k} failed with {error}: {problem!r}; {daemon.stderr[-2000:]}") from problem
            finally:
                tracer.close()
                talk.close()
    return f"  part 1: {len(plan)} cycles went on over a call that failed"


def lasting(run: Run, plan: list[tuple[str, str]], rng: random.Random) -> str:
    """Part 2: each fault once to its end, and once to a kill in the middle of it."""
    slowest = 0.0
    for call, error in plan:
        inject = (f"trace={call}", f"inject={call}:error={error}")
        with run.daemon() as daemon:
            talk = client(daemon)
            lease = run.model.see_batch(*talk.ask("get_batch", timeout_s=20))
            tracer = Tracer(daemon.disk_thread, *inject, follow=False)
            late = serve_meanwhile(run, talk, daemon, lease, call, error)
            tracer.close()
            slowest = max(slowest, wait_until_well(talk))
            late.receive()
            run.model.acked.add(lease)
            late.close()
            talk.close()
            talk = client(daemon)  # what the first one holds comes again
            converse(talk, run.model, batches=3)
            talk.close()
        daemon = ForkedDaemon(run.config)
        try:
            daemon.go()
            talk = client(daemon)
            lease = run.model.see_batch(*talk.ask("get_batch", timeout_s=20))
            tracer = Tracer(daemon.disk_thread, *inject, follow=False)
            serve_meanwhile(run, talk, daemon, lease, call, error).close()
            time.sleep(rng.random() / 10)
            daemon.signal(signal.SIGKILL)
            tracer.close()
            talk.close()
        finally:
            daemon.close()
        run.model.check(run.state)
    return (
        f"  part 2: {len(plan)} faults that lasted, over {slowest:.1f} s after their end at most; as many kills in them"
    )


def serve_meanwhile(run: Run, talk: Talk, daemon: ForkedDaemon, lease: str, call: str, error: str) -> Talk:
    """While a kind of call fails: the fault is named, and what can go on does.

    Returns:
        A client whose ``ack`` of the lease was sent; where the log cannot be written it is not answered yet.
    """
    what = f"while {call} fails with {error}"
    late = client(daemon)
    run.model.asked.add(lease)
    late.send("ack", lease=lease)
    if call in STOPS_THE_LOG:
        try:
            run.model.see_batch(*talk.ask("get_batch", timeout_s=0.1))
        except Refused as refused:
            must("cannot be written" in str(refused), f"{what}, another cause is given: {refused}")
    else:
        converse(talk, run.model, batches=3)  # nothing that is answered waits for this call
    wait_until_named(run, talk, error, what)
    return late


def wait_until_named(run: Run, talk: Talk, error: str, what: str) -> None:
    end = time.monotonic() + RECOVERY_S
    while (now := fault(talk)) is None or error not in now:
        must(time.monotonic() < end, f"{what}, the status does not say so: {now}")
        time.sleep(0.02)
    while not any(error in line for line in run.errors()):  # lines are written by a thread of their own
        must(time.monotonic() < end, f"{what}, the log does not say so")
        time.sleep(0.02)


def starts(run: Run, plan: list[tuple[str, str, int]], folder: Path) -> str:
    """Part 3: on a state that is whole, on one with a torn tail, and on one that is damaged in the middle."""
    outcomes: Counter[str] = Counter()
    for original in (run.state, _torn(run.state, folder), _damaged(folder), _damaged_format_1(folder)):
        expected = _recovered(original, folder)
        for call, fault, k in plan:
            copy = folder / "start"
            shutil.copytree(original, copy, ignore=shutil.ignore_patterns("reserve"))
            status = _start_in_a_fork(copy, f"trace={call}", f"inject={call}:{fault}:when={k}")
            what = f"on {original.name}, a start whose {k}-th {call} met {fault}"
            must(status in (0, 3) or (status == -9 and "KILL" in fault), f"{what} ended with {status}")
            must(_recovered(copy, folder) == expected, f"{what} changed the state")
            outcomes[{0: "came up", 3: "refused with a sentence", -9: "killed"}[status]] += 1
            shutil.rmtree(copy)
    return "  part 3: starts " + ", ".join(f"{count} {what}" for what, count in outcomes.items())


def _torn(state: Path, folder: Path) -> Path:
    torn = folder / "torn"
    shutil.copytree(state, torn, ignore=shutil.ignore_patterns("reserve"))
    with segment_path(torn, list_segments(torn)[-1]).open("ab") as file:
        file.write(b"RL\x01 the beginning of a record")
    return torn


def _damaged(folder: Path) -> Path:
    """A log of many segments after its snapshot, with a changed byte in one of the first."""
    state = anyio.run(plain_log, folder, 5, 1024)
    path = segment_path(state.directory, 3)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return Path(state.directory)


def _damaged_format_1(folder: Path) -> Path:
    """The same of format 1, whose segments do not say where the one before them ended."""
    directory = folder / "format 1"
    shutil.copytree(STATE_V1, directory, ignore=shutil.ignore_patterns("expected.json"))
    path = segment_path(directory, list_segments(directory)[-2])
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    return directory


def _recovered(directory: Path, folder: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=folder) as name:
        copy = Path(name) / "state"
        shutil.copytree(directory, copy, ignore=shutil.ignore_patterns("reserve"))
        return facts(recover(copy, SIZES, "fresh")[0])


def _start_in_a_fork(directory: Path, *expressions: str) -> int:
    """Exit status of a process that recovers: 0 well, 3 refused, 70 anything else."""
    reader, word = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            os.close(word)
            os.read(reader, 1)
            recover(directory, SIZES, "fresh")
            status = 0
        except StateError as error:
            status = 3 if str(error) and str(directory) in str(error) else 70
        finally:
            os._exit(status)
    os.close(reader)
    try:
        tracer = Tracer(pid, *expressions)
    finally:
        os.close(word)
    _, status = os.waitpid(pid, 0)
    tracer.close()
    return os.waitstatus_to_exitcode(status)


# -- a full disk -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(at: Path) -> Iterator[Path]:
    """A tmpfs of 1 MiB.

    Raises:
        PermissionError: this process may not mount.
    """
    at.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(at)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise PermissionError(done.stderr.strip())
    try:
        yield at
    finally:
        subprocess.run(["umount", "--lazy", str(at)], check=True)


def fill(disk: Path) -> None:
    """Something else takes all that is left of a disk."""
    with (disk / "ballast").open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1024))


def full(folder: Path) -> str:
    """Part 4."""
    with small_disk(folder / "disk") as disk:
        engines = [{"kind": "scripted", "time_scale": 0.0, "length": None}]
        settings = {"sampling": {"max_new_tokens": 400}, "engines": engines}
        run = Run(folder / "full", run={"state_dir": str(disk / "state")}, **settings)
        run.state = disk / "state"
        with run.daemon(_segments_for_a_small_disk) as daemon:
            talk = client(daemon)
            converse(talk, run.model, batches=3)
            served = _serve_on_a_full_disk(run, talk, disk)
            (disk / "ballast").unlink()
            wait_until_well(talk)
            held = [run.model.see_batch(*talk.ask("get_batch", timeout_s=20)) for _ in range(2)]
            _wait_for_a_full_disk(run, talk, disk)
        fill(disk)
        with run.daemon(_segments_for_a_small_disk) as daemon:  # killed on the full disk, started on it
            talk = client(daemon)
            again = [run.model.see_batch(*talk.ask("get_batch", timeout_s=20)) for _ in range(2)]
            must(again == held, "the batches that were held come again")
            must(fault(talk) is not None, "the disk is full and the status does not say so")
            subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
            seconds = wait_until_well(talk)
            talk.close()
            talk = client(daemon)
            converse(talk, run.model, batches=6)
        must(any("ENOSPC" in line for line in run.errors()), "the log does not say that the disk is full")
    return (
        f"  part 4: {served} batches served and acknowledged on a full disk of 1 MiB, killed on it and started again,"
        f" well {seconds:.1f} s after it had room"
    )


def _segments_for_a_small_disk() -> None:
    short_cycle(segment_bytes=48 << 10, snapshot_bytes=32 << 10)


def _come_to_rest(talk: Talk) -> None:
    """Until all that was launched is finished, and written, as a status reports nothing else.

    What the daemon gives up when it finds the disk full is for its own records: while it writes, whoever fills the disk
    might take that as well.
    """
    end = time.monotonic() + 20
    while talk.ask("status")[0]["generation"]["in_flight"]:
        must(time.monotonic() < end, "what was launched does not end")
    talk.ask("status")


def _wait_for_a_full_disk(run: Run, talk: Talk, disk: Path) -> None:
    end = time.monotonic() + 20
    _come_to_rest(talk)
    fill(disk)
    while (now := fault(talk)) is None or "ENOSPC" not in now:
        must(time.monotonic() < end, f"the disk is full and the status says {now}")
        _come_to_rest(talk)
        fill(disk)  # again and again: snapshots give back what is acknowledged
        version = run.model.version + 1
        run.model.asked_version = version
        talk.ask("set_policy_version", version=version, mode="keep")  # something to write
        run.model.version = version


def _serve_on_a_full_disk(run: Run, talk: Talk, disk: Path) -> int:
    """Take and acknowledge all that is buffered when the fault comes; returns how many batches that are."""
    _wait_for_a_full_disk(run, talk, disk)
    status = talk.ask("status")[0]
    buffered = min(source["groups"]["buffered"] for source in status["sources"].values())
    batches = buffered // 2  # each source gives two groups a batch
    must(batches > 0, f"nothing is buffered that could be served: {status['sources']}")
    for _ in range(batches):
        lease = run.model.see_batch(*talk.ask("get_batch", timeout_s=20))
        run.model.asked.add(lease)
        talk.ask("ack", lease=lease)
        run.model.acked.add(lease)
    run.model.see_status(talk.ask("status")[0])
    return batches


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="state-disk", description=HELP, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sample and of the kills")
    parser.add_argument("--sample", type=int, default=0, metavar="N", help="N faults of each part; 0: all")
    parser.add_argument("--keep", type=Path, help="where the state is made, and stays if something is wrong")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if shutil.which("strace") is None:
        print("state-disk needs strace: on Debian, apt-get install strace", file=sys.stderr)
        return 2
    imported()
    began = time.monotonic()
    rng = random.Random(options.seed)

    def some(plan: list[Any]) -> list[Any]:
        return rng.sample(plan, min(len(plan), options.sample or len(plan)))

    with scratch(options.keep, "state-disk") as folder:
        run = Run(folder / "run")
        counts = count_calls(run, folder)
        print(f"  calls of a cycle: {counts}")
        pairs = [(call, error) for call in counts for error in ERRORS]
        print(once(run, some([(c, e, k) for c, e in pairs for k in range(1, counts[c] + 1)])), flush=True)
        print(lasting(run, some([pair for pair in pairs if pair[0] != "fallocate"]), rng), flush=True)
        first = {"read": 2}  # the first one is that of the word to begin
        faults = [*(f"error={error}" for error in ERRORS), "signal=KILL"]
        plan = [(c, fault, k) for c in START_CALLS for fault in faults for k in range(first.get(c, 1), 9)]
        print(starts(run, some(plan) + some(plan), folder), flush=True)
        try:
            print(full(folder))
        except PermissionError as error:
            print(f"  part 4: NOT DONE, for a tmpfs cannot be mounted here ({error}): run this script as root")
    print(
        f"state-disk: seed {options.seed}, {run.model.checks} ends agreed with the model,"
        f" {time.monotonic() - began:.0f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
