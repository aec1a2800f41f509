"""Kill a daemon at every system call of a cycle, and client or daemon between every two messages; compare with a model.

Run it by ``scripts/torture/state-kills``.
"""

from __future__ import annotations

import argparse
import random
import re
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

from orchestrator.state.segments import Record, Segment, list_segments
from tests.torture.client import Gone, converse, load_again, steps
from tests.torture.daemon import ForkedDaemon, Tracer, imported, prepare, scratch
from tests.torture.model import Model, Violation, must

CALLS = (
    "write",
    "writev",
    "pwrite64",
    "pwritev",
    "pwritev2",
    "fdatasync",
    "fsync",
    "rename",
    "openat",
    "unlink",
    "unlinkat",
    "rmdir",
    "mkdir",
    "link",
    "linkat",
    "ftruncate",
    "sendmsg",
    "sendto",
    "mmap",
)
"""What Python and uvloop use for files and sockets; a call that a cycle does not make is reported as such."""

HELP = """A real daemon with small segments goes through cycles of buffering, handing out, acknowledging, archiving,
snapshots and compaction, in one state directory all the time. In each cycle strace kills it at the k-th call of one
kind. Then the state is recovered and compared, with the archive, with a model of all that was reported, and the next
cycle goes on from there. Then the same between every two messages of a conversation: the daemon is killed there, or the
client goes."""


class Sweep:
    """The run and its model, over all kills."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.config = prepare(folder / "run", archive={"path": "archive"})
        self.archive = folder / "run" / "archive"
        self.archived = 0
        self.state = folder / "run" / "state"
        self.model = Model()
        self.rng = random.Random(seed)
        self.records: Counter[str] = Counter()

    def start(self, *expressions: str, output: Path = Path("/dev/null")) -> tuple[ForkedDaemon, Tracer | None]:
        daemon = ForkedDaemon(self.config)
        try:
            tracer = Tracer(daemon.pid, *expressions, output=output) if expressions else None
            daemon.go()
        except BaseException:
            daemon.close()
            raise
        return daemon, tracer

    def cycle(self, *expressions: str, output: Path = Path("/dev/null")) -> bool:
        """One start and conversation; whether it went to its end. The daemon is dead afterwards and the state checked.

        Raises:
            Violation: the state contradicts the model.
        """
        daemon, tracer = self.start(*expressions, output=output)
        is_whole = False
        try:
            if (talk := daemon.connect()) is not None:
                try:
                    converse(talk, self.model, checkpoints=True)
                    is_whole = True
                except Gone:
                    must(daemon.wait() != 0, "the daemon closed the connection and ended well")
                finally:
                    talk.close()
            status = daemon.poll()
            must(status in (None, -9), f"the daemon ended with {status}: {daemon.stderr[-3000:]}")
        finally:
            daemon.close()
            if tracer is not None:
                tracer.close()
        self.check()
        return is_whole

    def check(self) -> None:
        self.archived = self.model.check_archive(self.archive, self.model.check(self.state))
        for number in list_segments(self.state):
            for record in Segment(self.state, number).records():
                self.records[record.kind.name if isinstance(record, Record) else "cut off"] += 1

    def count(self, folder: Path) -> dict[str, int]:
        """How often a whole cycle makes each call; of the thread that makes it most often, as strace counts."""
        self.cycle()  # the first start differs: there is nothing to compact or to remove
        trace = folder / "trace"
        must(self.cycle(f"trace={','.join(CALLS)}", output=trace), "an undisturbed cycle did not end")
        seen = Counter(re.findall(r"^(\d+) +(\w+)\(", trace.read_text(errors="replace"), re.MULTILINE))
        trace.unlink()
        return {call: max((n for (_, name), n in seen.items() if name == call), default=0) for call in CALLS}

    # -- between messages

    def kill_daemon_after(self, step: int) -> None:
        daemon, _ = self.start()
        talk = daemon.connect()
        assert talk is not None
        for i, _ in enumerate(steps(talk, self.model, checkpoints=True)):
            if i == step:
                break
        time.sleep(self.rng.choice((0, 0, 0.0005, 0.002, 0.01)))
        daemon.close()
        talk.close()
        self.check()

    def leave_after(self, step: int, daemon: ForkedDaemon) -> None:
        """The client goes; the next one gets what it left."""
        talk = daemon.connect()
        assert talk is not None
        for i, _ in enumerate(steps(talk, self.model, checkpoints=True)):
            if i == step:
                break
        talk.close()
        talk = daemon.connect()
        assert talk is not None
        if self.model.loading is not None:
            load_again(talk, self.model, self.model.loading)
        converse(talk, self.model, batches=4, checkpoints=True)
        talk.close()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="state-kills", description=HELP, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sample, and of the moments between messages")
    parser.add_argument("--sample", type=int, default=0, metavar="N", help="N kills of each of the three kinds; 0: all")
    parser.add_argument("--calls", default=",".join(CALLS), help="the system calls, with commas")
    parser.add_argument("--keep", type=Path, help="where the state is made, and stays if something is wrong")
    parser.add_argument("--verbose", action="store_true", help="a line for each kill")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if shutil.which("strace") is None:
        print("state-kills needs strace: on Debian, apt-get install strace", file=sys.stderr)
        return 2
    imported()
    began = time.monotonic()
    with scratch(options.keep, "state-kills") as folder:
        sweep = Sweep(folder, options.seed)
        try:
            report = _run(sweep, folder, options)
        except Violation as error:
            print(f"state-kills: VIOLATION (seed {options.seed}): {error}", file=sys.stderr)
            print(sweep.config.parent.joinpath("stderr").read_text(errors="replace")[-3000:], file=sys.stderr)
            raise
    print(report)
    print(
        f"state-kills: seed {options.seed}, {sweep.model.checks} restarts agreed with the model, {sweep.model.step}"
        f" batches, {sweep.archived} in the archive, {len(sweep.model.groups)} groups, records seen"
        f" {dict(sorted(sweep.records.items()))}, {time.monotonic() - began:.0f} s"
    )
    return 0


def _run(sweep: Sweep, folder: Path, options: argparse.Namespace) -> str:
    counts = sweep.count(folder)
    plan = [(call, k) for call in options.calls.split(",") for k in range(1, counts[call] + 1)]
    if options.sample:  # of each call alike, for some are made a hundred times as often as others
        sweep.rng.shuffle(plan)
        turn: Counter[str] = Counter()
        order = {pair: turn.update([pair[0]]) or turn[pair[0]] for pair in plan}
        plan = sorted(plan, key=lambda pair: order[pair])[: options.sample]
    killed: Counter[str] = Counter()
    for call, k in plan:
        is_whole = sweep.cycle(f"trace={call}", f"inject={call}:signal=KILL:when={k}")
        killed[call] += not is_whole
        if options.verbose:
            print(f"{call} {k}: {'not reached' if is_whole else 'killed'}", flush=True)
    lines = [f"  {call:10} {counts[call]:4} calls in a cycle, killed at {killed[call]}" for call in CALLS]
    places = _places(sweep)
    chosen = sweep.rng.sample(range(places), min(places, options.sample or places))
    for step in chosen:
        sweep.kill_daemon_after(step)
    daemon, _ = sweep.start()
    try:
        for step in chosen:
            sweep.leave_after(step, daemon)
    finally:
        daemon.close()
    sweep.check()
    lines.append(f"  between messages: {places} places, daemon killed and client gone at {len(chosen)} each")
    must(sweep.archived > 10, "nearly nothing was archived")
    must(sweep.records["MOVED"], "nothing was compacted: the cycle is not a whole one")
    must(sum(killed.values()) >= 0.5 * len(plan), f"only {sum(killed.values())} of {len(plan)} kills were reached")
    return "\n".join(lines)


def _places(sweep: Sweep) -> int:
    daemon, _ = sweep.start()
    talk = daemon.connect()
    assert talk is not None
    try:
        return sum(1 for _ in steps(talk, sweep.model, checkpoints=True))
    finally:
        talk.close()
        daemon.close()


if __name__ == "__main__":
    sys.exit(main())
