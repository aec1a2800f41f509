"""All producers together: they run, stop, and run again, all of them or some.

Invariants:

* Stopped means parked: what every sample in flight had gained is recorded, and nothing more is.
* Whoever stops them starts them again, or means to end for good.
* A producer is exchanged only while it is stopped.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final

import anyio
from anyio.abc import TaskStatus

from orchestrator.concurrency.broadcast import Broadcast
from orchestrator.errors import StateError

from .producer import Producer

__all__ = ["PARK_DEADLINE_S", "Producers"]

PARK_DEADLINE_S: Final = 30.0
"""Parking cuts connections and records partial rollouts; it waits for no generation."""


class _Running:
    """One producer at work, from its start until it is parked."""

    def __init__(self) -> None:
        self.scope = anyio.CancelScope()
        self.parked = anyio.Event()


class Producers:
    """See the module's invariants.

    Args:
        producers: by source; :meth:`put` and :meth:`remove` change them.
    """

    def __init__(self, producers: Mapping[str, Producer]) -> None:
        self._producers = dict(producers)
        self._running: dict[str, _Running] = {}
        self._stopped: set[str] = set()
        self._changed = Broadcast()

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """Run the producers whenever they are not stopped; until cancelled."""
        task_status.started()  # first: a client may have drained the daemon before it got here
        async with anyio.create_task_group() as tasks:
            while True:
                changed = self._changed.next()
                for name in [name for name in self._producers if name not in self._stopped | self._running.keys()]:
                    self._running[name] = _Running()
                    tasks.start_soon(self._work, name, name=f"producer of {name}")
                await changed.wait()

    async def _work(self, name: str) -> None:
        run = self._running[name]
        with run.scope:
            await self._producers[name].run()
        del self._running[name]
        run.parked.set()
        self._changed.notify()  # whoever gave up waiting for this may have started it again

    async def stop(self, names: Collection[str] | None = None) -> None:
        """Return when everything in flight is parked; of all sources, or of some. The caller sets a deadline."""
        stopping = [name for name in self._producers if names is None or name in names]
        self._stopped.update(stopping)
        running = [self._running[name] for name in stopping if name in self._running]
        for run in running:
            run.scope.cancel()
        for run in running:
            await run.parked.wait()

    async def park(self, names: Collection[str] | None = None) -> None:
        """As :meth:`stop`, with a deadline.

        Raises:
            StateError: they were not parked in time; the producers go on.
        """
        with anyio.move_on_after(PARK_DEADLINE_S):
            await self.stop(names)
            return
        raise StateError(f"what is in flight could not be parked within {PARK_DEADLINE_S:g} s; nothing has changed")

    def start(self) -> None:
        """Go on, with what is in flight by then."""
        self._stopped.clear()
        self._changed.notify()

    def put(self, name: str, producer: Producer) -> None:
        """This one produces for the source from the next :meth:`start` on."""
        self._producers[name] = producer
        self._stopped.add(name)

    def remove(self, name: str) -> None:
        """Nobody produces for the source any more."""
        del self._producers[name]
