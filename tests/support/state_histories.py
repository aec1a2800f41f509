"""Histories of the state store for tests: random changes of the kinds that a daemon makes, and what a ledger says."""

from __future__ import annotations

import hashlib
import random
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio

from orchestrator.core.ledger.events import Archived, BatchFormed, Dropped, Launched, LeaseAcked, VersionSet
from orchestrator.core.ledger.groups import InFlight
from orchestrator.core.ledger.ledger import Ledger, SourceSize
from orchestrator.core.ledger.partials import encode_partial
from orchestrator.state import StateStore
from tests.support.builders import frame_for, make_sample

SIZES = {"easy": SourceSize(50), "hard": SourceSize(50)}


@asynccontextmanager
async def opened(directory: Path, *, segment_bytes: int = 1 << 20) -> AsyncIterator[StateStore]:
    """A running store; leaving it is a clean stop."""
    store = await StateStore.open(directory, SIZES, segment_bytes=segment_bytes)
    async with anyio.create_task_group() as tasks:
        await tasks.start(store.run)
        yield store
        tasks.cancel_scope.cancel()
    assert await store.aclose()


def digest(frame: bytes | memoryview) -> str:
    return hashlib.sha256(frame).hexdigest()


def facts(ledger: Ledger, *, without: Iterable[int] = ()) -> dict[str, Any]:
    """All that a ledger knows but the places of frames; groups in ``without`` are left out."""
    gone = set(without)
    return {
        "step": ledger.step,
        "next": [ledger.next_group, ledger.next_sample],
        "version": ledger.policy_version,
        "sources": {
            name: {
                "cursor": [s.epoch, s.position],
                "carry": s.carry,
                "paused": s.paused,
                "weight": s.weight_override,
                "in_flight": {
                    str(f.group_index): [list(f.prompt), [digest(frame) for _, frame in f.partials]]
                    for f in s.in_flight.values()
                    if f.group_index not in gone
                },
                "ready": {str(i): digest(g.frame) for i, g in sorted(s.ready.items()) if i not in gone},
                "rerun": [list(prompt) for prompt in s.rerun],
                "counts": [s.launched, s.handed_out, s.acknowledged],
                "dropped": {reason: count.groups for reason, count in s.dropped.items()},
            }
            for name, s in ledger.sources.items()
        },
        "leases": {
            str(step): [
                [s.is_done, [[g.group_index, digest(g.frame)] for g in s.groups if g.group_index not in gone]]
                for s in batch.shares
            ]
            for step, batch in ledger.leases.batches.items()
        },
        "unarchived": {
            str(batch.key.step): {str(i): digest(g.frame) for i, g in batch.groups.items() if g.damage is None}
            for batch in ledger.unarchived.batches.values()
        },
    }


def act(store: StateStore, rng: random.Random) -> None:
    """One random change, of the kinds that a running daemon makes."""
    ledger = store.ledger
    state = ledger.source(rng.choice(list(SIZES)))
    choice = rng.random()
    if choice < 0.35:
        event = ledger.next_launch(state.name, 2, lambda _epoch, position: position)
        assert event is not None
        store.record(event)
    elif choice < 0.6 and state.in_flight:
        flight = rng.choice(list(state.in_flight.values()))
        event = launched(flight)
        store.store_group(frame_for(event, lengths=(rng.randrange(50), 7), version=ledger.policy_version))
    elif choice < 0.7 and state.in_flight:
        flight = rng.choice(list(state.in_flight.values()))
        sample = make_sample(flight.first_sample, length=rng.randrange(1, 40))
        store.store_partial(
            encode_partial(source=state.name, group_index=flight.group_index, slot=0, sample=sample, start=0)
        )
    elif choice < 0.75 and state.ready:
        store.record(Dropped(state.name, rng.choice(list(state.ready)), "stale", [1, 2], rerun=True))
    elif choice < 0.85 and state.ready:
        shares = [[g.group_index for g in state.oldest_ready(3)]]
        store.record(BatchFormed(ledger.step, ledger.policy_version, {}, {}, {state.name: 0.5}, shares))
    elif choice < 0.95 and ledger.leases.batches:
        store.record(LeaseAcked(rng.choice(list(ledger.leases.batches)), 0, archive=rng.random() < 0.7))
    elif choice < 0.97 and ledger.unarchived.batches:
        store.record(Archived(*rng.choice(list(ledger.unarchived.batches))))
    else:
        store.record(VersionSet(ledger.policy_version + 1))


def launched(flight: InFlight) -> Launched:
    """The event that launched it."""
    return Launched(
        flight.source,
        flight.group_index,
        flight.first_sample,
        flight.n,
        flight.prompt.prompt_index,
        flight.prompt.epoch,
    )
