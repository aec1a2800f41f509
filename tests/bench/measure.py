"""Taking turns, medians, and the clocks of this process and of others."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from tests.bench.result import Unavailable


@dataclass(frozen=True)
class Taken:
    """What one turn took: seconds by the wall, seconds of CPU time, and how many units of work were done in it."""

    wall_s: float
    cpu_s: float
    units: float = 1.0

    @property
    def wall(self) -> float:
        """Microseconds a unit."""
        return 1e6 * self.wall_s / self.units

    @property
    def cpu(self) -> float:
        """Microseconds of CPU time a unit."""
        return 1e6 * self.cpu_s / self.units


Turn = Callable[[], Taken]
Rounds = Mapping[str, Sequence[Taken]]


def interleave(
    contenders: Mapping[str, Turn],
    rounds: int,
    *,
    warm: bool = True,
    lose: Callable[[str, Unavailable], None] | None = None,
) -> dict[str, list[Taken]]:
    """Give each contender one turn a round; who begins changes from round to round.

    Args:
        contenders: by name.
        rounds: that count.
        warm: one round before them that does not.
        lose: told of a contender that became unavailable: it raises, or that one is left out and the others go on.
    """
    names = list(contenders)
    results: dict[str, list[Taken]] = {name: [] for name in names}

    def turn(name: str) -> None:
        if name in results:
            try:
                results[name].append(contenders[name]())
            except Unavailable as why:
                if lose is None:
                    raise
                lose(name, why)
                del results[name]

    for name in names if warm else ():
        turn(name)
    for taken in results.values():
        taken.clear()
    for i in range(rounds):
        for j in range(len(names)):
            turn(names[(i + j) % len(names)])
    return results


def cpu(results: Sequence[Taken]) -> float:
    """Median CPU time of a unit, in microseconds."""
    return statistics.median(taken.cpu for taken in results)


def wall(results: Sequence[Taken]) -> float:
    """Median time of a unit by the wall, in microseconds."""
    return statistics.median(taken.wall for taken in results)


def cpu_ratio(results: Rounds, a: str, b: str) -> float:
    """CPU time of ``a`` over that of ``b``: the median of the rounds' ratios."""
    return statistics.median(x.cpu / max(y.cpu, 1e-9) for x, y in zip(results[a], results[b], strict=True))


def wall_ratio(results: Rounds, a: str, b: str) -> float:
    """The same by the wall."""
    return statistics.median(x.wall / max(y.wall, 1e-9) for x, y in zip(results[a], results[b], strict=True))


def exponent(points: Iterable[tuple[float, float]]) -> float:
    """The slope of a straight line through (log size, log cost): 1 where cost grows as size does."""
    logs = [(math.log(size), math.log(max(cost, 1e-12))) for size, cost in points]
    return statistics.linear_regression([x for x, _ in logs], [y for _, y in logs]).slope


def cpu_of(pid: int) -> float:
    """Seconds of CPU time that a living process has used, all its threads, to the nanosecond.

    The clock's number is made as ``clock_getcpuclockid`` makes it.
    """
    return time.clock_gettime(~pid << 3 | 2)


class Watch:
    """Filled when the block of :func:`watched` ends."""

    wall_s = 0.0
    cpu_s = 0.0

    def taken(self, units: float = 1.0) -> Taken:
        return Taken(self.wall_s, self.cpu_s, units)


@contextmanager
def watched(*pids: int) -> Iterator[Watch]:
    """Measure a block: of this process, and of others that live on."""
    watch = Watch()
    clocks = [os.getpid(), *pids]
    before, began = [cpu_of(pid) for pid in clocks], time.perf_counter()
    yield watch
    watch.wall_s = time.perf_counter() - began
    watch.cpu_s = sum(cpu_of(pid) - earlier for pid, earlier in zip(clocks, before, strict=True))


def family(*pids: int) -> set[int]:
    """Processes and all that descend from them now."""
    parents = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat", "rb") as stat:
                parents[int(name)] = int(stat.read().rpartition(b")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue  # ended meanwhile
    found, new = set(pids), set(pids)
    while new:
        new = {pid for pid, parent in parents.items() if parent in new} - found
        found |= new
    return found


@contextmanager
def watched_families(*pids: int) -> Iterator[Watch]:
    """As :func:`watched`, with all that descend from the others; what one that ended used is not known."""
    watch, earlier = Watch(), _clocks(family(*pids))
    own, began = cpu_of(os.getpid()), time.perf_counter()
    yield watch
    watch.wall_s, own = time.perf_counter() - began, cpu_of(os.getpid()) - own
    watch.cpu_s = own + sum(used - earlier.get(pid, 0.0) for pid, used in _clocks(family(*pids)).items())


def _clocks(pids: Iterable[int]) -> dict[int, float]:
    found = {}
    for pid in pids:
        with suppress(OSError):  # it ended meanwhile
            found[pid] = cpu_of(pid)
    return found


def run_to_end(command: Sequence[str], **environment: str) -> Taken:
    """Run a program to its end; its CPU time includes that of its own children.

    Raises:
        RuntimeError: it failed.
    """
    began = time.perf_counter()
    actions = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1)]
    pid = os.posix_spawn(command[0], command, {**os.environ, **environment}, file_actions=actions, setpgroup=0)
    _, status, usage = os.wait4(pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)} failed with status {status}")
    return Taken(time.perf_counter() - began, usage.ru_utime + usage.ru_stime)
