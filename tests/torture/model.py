"""For the torture scripts: a model of a run, which knows what the daemon has *reported*.

Groups as finished, batches as leased, batches as acknowledged, versions as set: after each end of the daemon the state
on disk has to agree with it (:meth:`Model.check`), and so has every answer.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.archive import list_steps, read_groups
from orchestrator.core.ledger.ledger import Ledger, SourceSize
from orchestrator.frames import GroupFrame
from orchestrator.state.recovery import recover
from tests.support.group_frames import iter_group_frames

ROWS = 50
SIZES = {"easy": SourceSize(ROWS), "hard": SourceSize(ROWS)}
BATCH = 4


class Violation(AssertionError):
    """The state on disk, or an answer, contradicts what was reported before."""


def must(holds: object, message: str) -> None:
    if not holds:
        raise Violation(message)


def digest(frame: bytes | memoryview) -> str:
    return hashlib.sha256(frame).hexdigest()


@dataclass
class Model:
    """What the daemon has reported.

    ``leased``: lease → its groups; ``acked``: leases whose ``ack`` was answered; ``asked``: whose was sent. ``groups``:
    frame and prompt of every group that was ever seen. ``finished``: the largest number reported, by source.
    ``trained`` and ``ever_asked`` are ``acked`` (with its groups) and ``asked`` of all times: loads take nothing back.
    """

    leased: dict[str, list[int]] = field(default_factory=dict)
    acked: set[str] = field(default_factory=set)
    asked: set[str] = field(default_factory=set)
    groups: dict[int, tuple[str, str, tuple[int, int]]] = field(default_factory=dict)
    finished: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SIZES, 0))
    version: int = 0
    asked_version: int = 0
    step: int = 0
    rows: int = ROWS
    checks: int = 0
    saved: dict[str, Model] = field(default_factory=dict)
    loading: str | None = None
    trained: dict[str, list[int]] = field(default_factory=dict)
    ever_asked: set[str] = field(default_factory=set)

    # -- checkpoints

    def save(self, name: str, held: Iterable[str]) -> None:
        """A checkpoint was saved: what was reported by then can come back.

        An ``ack`` that was sent and never answered was heard, if by now its batch has not come again.
        """
        self.acked |= self.asked - set(held)
        self.saved[name] = self._copy()

    def load(self, name: str) -> None:
        """A checkpoint was loaded. Its leases have other names now, which their groups have to turn up under.

        An ``ack`` of one of them that was sent and never answered says nothing any more: the lease has ended.
        """
        was, saved, checks = self.saved[name]._copy(), self.saved, self.checks
        trained, ever_asked = self.trained, self.ever_asked
        self.__dict__.update(was.__dict__)
        self.leased = {lease: groups for lease, groups in was.leased.items() if lease in was.acked}
        self.asked = was.asked & was.acked
        self.saved, self.checks, self.loading = saved, checks, None
        self.trained, self.ever_asked = trained, ever_asked

    def _copy(self) -> Model:
        facts = {key: getattr(self, key) for key in self.__dataclass_fields__}
        copies = {key: value.copy() for key, value in facts.items() if isinstance(value, dict | set)}
        return Model(**{**facts, **copies, "saved": {}})

    # -- what clients see

    def see_batch(self, result: dict[str, Any], payload: bytes) -> str:
        """A ``get_batch`` was answered; returns the lease."""
        lease = result["lease"]
        frames = list(iter_group_frames(payload))
        indices = [self._see(frame.buffer, frame) for frame in frames]
        must(lease not in self.acked, f"batch {lease} was acknowledged and came again")
        if lease in self.leased:
            must(self.leased[lease] == indices, f"batch {lease} came again with other groups")
        else:
            others = {index for groups in self.leased.values() for index in groups}
            must(not others & set(indices), f"batch {lease} has groups of another batch")
            must(len(indices) == BATCH, f"batch {lease} has {len(indices)} groups")
        self.leased[lease] = indices
        self.step = max(self.step, result["step"] + 1)
        return str(lease)

    def _see(self, data: bytes | memoryview, frame: GroupFrame) -> int:
        header = frame.header
        index = header["group_index"]
        known = (digest(data), header["source"], (header["prompt_index"], header["epoch"]))
        must(self.groups.setdefault(index, known) == known, f"group {index} is not what it was")
        return int(index)

    def see_status(self, status: dict[str, Any]) -> None:
        must(not status["problems"], f"damage where there is none: {status['problems']}")
        total = 0
        for name, source in status["sources"].items():
            groups = source["groups"]
            finished = groups["buffered"] + groups["leased"] + groups["acknowledged"]
            must(finished >= self.finished[name], f"{name}: {finished} groups are finished, {self.finished[name]} were")
            self.finished[name] = finished
            must(not groups["dropped"], f"{name}: groups were dropped: {source['dropped']}")
            total += groups["launched"]
            must(groups["launched"] == finished + groups["in_flight"], f"{name}: {groups} do not add up")
        must(total == status["next_group_index"], "launched groups and indices do not agree")

    # -- what is on the disk

    def check(self, directory: Path) -> Ledger:
        """Recover a copy of the state, as the next start would, and compare.

        Raises:
            Violation: it contradicts what was reported.
        """
        self.checks += 1
        with tempfile.TemporaryDirectory() as folder:  # elsewhere: the disk may be full
            copy = Path(folder) / "state"
            shutil.copytree(directory, copy, ignore=shutil.ignore_patterns("reserve"))
            ledger, found = recover(copy, SIZES, "fresh")
            must(not found.problems, f"damage where there is none: {found.problems}")
            if self.loading is not None:
                self._settle_load(ledger)
            self.check_ledger(ledger)
        return ledger

    def _settle_load(self, ledger: Ledger) -> None:
        """A checkpoint was being loaded: the state is the one before or that of the checkpoint, and nothing else."""
        name, self.loading = self.loading, None
        try:
            self._copy().check_ledger(ledger)
        except Violation:
            assert name is not None
            self.load(name)

    def check_ledger(self, ledger: Ledger) -> None:
        leased = {
            ledger.leases.name(batch, share.rank): [group.group_index for group in share.groups]
            for batch, share in ledger.leases.open_shares()
        }
        for lease in leased:
            must(lease not in self.acked, f"batch {lease} was acknowledged and is leased again")
        gone = set(self.leased) - set(leased)
        must(gone <= self.asked | self.acked, f"batches {gone - self.asked - self.acked} are lost")
        self.acked |= gone
        self.trained.update((lease, self.leased[lease]) for lease in gone)
        must(ledger.step >= self.step, f"step {ledger.step} after {self.step} batches")
        must(
            self.version <= ledger.policy_version <= self.asked_version,
            f"version {ledger.policy_version} where {self.version} to {self.asked_version} was set",
        )
        for lease, indices in leased.items():
            must(self.leased.setdefault(lease, indices) == indices, f"batch {lease} has other groups than before")
        self._check_frames(ledger)
        self._check_places(ledger)

    def check_archive(self, directory: Path, ledger: Ledger) -> int:
        """Each batch that was acknowledged is in a file, or in the state, as it was; how many files there are.

        Raises:
            Violation: one is not, or something else is in the archive.
        """
        files = {(f.history, f.step): sorted(g["group_index"] for g in read_groups(f)) for f in list_steps(directory)}
        waiting = {tuple(key): sorted(batch.groups) for key, batch in ledger.unarchived.batches.items()}
        for lease, indices in self.trained.items():
            history, step = lease.split(".")[:2]
            there = [place[history, int(step)] for place in (files, waiting) if (history, int(step)) in place]
            must(there, f"batch {lease} was acknowledged and is neither in the archive nor on its way")
            must(all(found == sorted(indices) for found in there), f"batch {lease} is archived with other groups")
        known = {(lease.split(".")[0], int(lease.split(".")[1])) for lease in self.ever_asked}
        must(files.keys() <= known, f"what nobody acknowledged is in the archive: {files.keys() - known}")
        return len(files)

    def _check_frames(self, ledger: Ledger) -> None:
        for state in ledger.sources.values():
            for group in state.ready.values():
                self._see(group.frame, GroupFrame(group.frame))
        for _, share in ledger.leases.open_shares():
            for group in share.groups:
                self._see(group.frame, GroupFrame(group.frame))

    def _check_places(self, ledger: Ledger) -> None:
        """Every index from 0 on is in one place; each source's prompts were launched one after the other."""
        done = {index for lease in self.acked for index in self.leased[lease]}
        where: dict[int, list[str]] = {}
        prompts: dict[str, dict[int, tuple[int, int]]] = {name: {} for name in ledger.sources}
        for index in done:
            where.setdefault(index, []).append("acknowledged")
            prompts[self.groups[index][1]][index] = self.groups[index][2]
        for name, state in ledger.sources.items():
            finished = sum(1 for index in done if self.groups[index][1] == name) + len(state.ready)
            for flight in state.in_flight.values():
                where.setdefault(flight.group_index, []).append("in flight")
                prompts[name][flight.group_index] = tuple(flight.prompt)
            for group in state.ready.values():
                where.setdefault(group.group_index, []).append("buffered")
                prompts[name][group.group_index] = tuple(group.prompt)
            for _, share in ledger.leases.open_shares():
                for group in share.groups:
                    if group.source == name:
                        where.setdefault(group.group_index, []).append("leased")
                        prompts[name][group.group_index] = tuple(group.prompt)
                        finished += 1
            must(
                finished >= self.finished[name],
                f"{name}: {finished} groups are finished, {self.finished[name]} were reported",
            )
        must(sorted(where) == list(range(ledger.next_group)), f"indices are missing or invented: {sorted(where)}")
        double = {index: places for index, places in where.items() if len(places) > 1}
        must(not double, f"groups in two places: {double}")
        for name, taken in prompts.items():
            order = [taken[index] for index in sorted(taken)]
            expected = [(i % self.rows, i // self.rows) for i in range(len(order))]
            must(order == expected, f"{name}: prompts were skipped or repeated: {order}")
            state = ledger.source(name)
            must(state.epoch * self.rows + state.position == len(order), f"{name}: the cursor is elsewhere")
