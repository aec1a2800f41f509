"""Whatever fills the sources' buffers, all together: it runs, stops, and runs again, for all sources or for some.

Invariants:

* Stopped means parked: what every sample in flight had gained is recorded, and nothing more is.
* Whoever stops them starts them again, or means to end for good.
* What fills a source is exchanged only while it is stopped, and is known by its port alone (``group_source``): a
  producer, or an intake to which somebody outside brings groups.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final

import anyio
from anyio.abc import TaskStatus
from structlog.typing import FilteringBoundLogger

from orchestrator.concurrency.broadcast import Broadcast
from orchestrator.errors import StateError

from .group_source import GroupSource

__all__ = ["PARK_DEADLINE_S", "Producers"]

PARK_DEADLINE_S: Final = 30.0
"""Parking cuts connections and records partial rollouts; it waits for no generation."""

FIRST_PAUSE_S: Final = 0.5
MAX_PAUSE_S: Final = 30.0
MAX_DOUBLINGS: Final = 10
"""Before a producer that ended by itself starts again: a fault must not use a core up, nor stop its source for good."""


class _Running:
    """One source at work, from its start until it is parked."""

    def __init__(self) -> None:
        self.scope = anyio.CancelScope()
        self.parked = anyio.Event()


class Producers:
    """See the module's invariants.

    Args:
        producers: what fills each source, by the source's name; :meth:`put` and :meth:`remove` change them.
        log: for one that ends by itself.
    """

    def __init__(self, producers: Mapping[str, GroupSource], log: FilteringBoundLogger) -> None:
        self._producers = dict(producers)
        self._log = log
        self._running: dict[str, _Running] = {}
        self._stopped: set[str] = set()
        self._changed = Broadcast()

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """Run them whenever they are not stopped; until cancelled."""
        task_status.started()  # first: a client may have drained the daemon before it got here
        async with anyio.create_task_group() as tasks:
            while True:
                changed = self._changed.next()
                for name in [name for name in self._producers if name not in self._stopped | self._running.keys()]:
                    self._running[name] = _Running()
                    tasks.start_soon(self._work, name, name=f"producer of {name}")
                await changed.wait()

    async def _work(self, name: str) -> None:
        """Run one until it is stopped. One that ends by itself begins again, after a pause and with a line."""
        run, ends = self._running[name], 0
        with run.scope:
            while True:
                await self._producers[name].run()
                ends += 1
                pause_s = min(MAX_PAUSE_S, FIRST_PAUSE_S * 2 ** min(ends, MAX_DOUBLINGS))
                self._log.error(f"the producer of {name} ended by itself; it starts again in {pause_s:g} s")
                await anyio.sleep(pause_s)
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
            StateError: they were not parked in time; they go on.
        """
        with anyio.move_on_after(PARK_DEADLINE_S):
            await self.stop(names)
            return
        raise StateError(f"what is in flight could not be saved within {PARK_DEADLINE_S:g} s; nothing changed")

    def start(self) -> None:
        """Go on, with what is in flight by then."""
        self._stopped.clear()
        self._changed.notify()

    def put(self, name: str, producer: GroupSource) -> None:
        """This one fills the source from the next :meth:`start` on."""
        self._producers[name] = producer
        self._stopped.add(name)

    def remove(self, name: str) -> None:
        """Nobody fills the source any more."""
        del self._producers[name]
