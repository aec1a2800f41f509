"""Watches batches that are waited for: says why in the log, and lets others stand in when patience is over.

Invariants:

* Whatever is waited for is looked at every :attr:`Starvation.period_s`: the patience, or :data:`FIRST_WORD_S` where
  that is longer. A wait that is that long is told of with its cause, once; another cause in the same wait is told of
  when it is seen, so that it is said within two periods (G8).
* As long as somebody waits, each cause is said again after :data:`LONGEST_SILENCE_S`.
* Under ``borrow`` others may stand in when patience is over; under ``wait`` nothing but the log lines happens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

import anyio
from anyio.abc import TaskStatus
from structlog.typing import FilteringBoundLogger

from orchestrator.concurrency.broadcast import Broadcast
from orchestrator.core.ledger.ledger import Ledger
from orchestrator.core.mixture.mixer import Mixer
from orchestrator.core.mixture.outlook import Shortage

from .waits import Wait, Waiting, Waits

__all__ = ["Starvation", "StarvationStatistics"]

FIRST_WORD_S: Final = 1.0
"""No line earlier than this, however short the patience: batches that are a moment late are no news."""

LONGEST_SILENCE_S: Final = 600.0
"""A batch that does not come for hours is told of every ten minutes."""

Explain = Callable[[Waiting | Shortage | None], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class StarvationStatistics:
    """How the wait for the next batch stands.

    ``waiting_s``: seconds since somebody first waited for it, ``None`` if nobody has; ``waiting``: requests that wait
    at this moment, for whatever reason; ``is_borrowing``: whether others may stand in by now.
    """

    policy: Literal["wait", "borrow"]
    patience_s: float
    waiting_s: float | None
    waiting: int
    is_borrowing: bool


class Starvation:
    """See the module's invariants.

    Args:
        mixer: lets others stand in.
        ledger: for the step.
        waits: who waits for what.
        policy: ``wait`` or ``borrow``.
        patience_s: how long a batch waits for the sources that it lacks alone.
        replan: wakes the producers of those that stand in.
        changed: wakes waiting requests.
        log: where the causes go.
    """

    def __init__(
        self,
        *,
        mixer: Mixer,
        ledger: Ledger,
        waits: Waits,
        policy: Literal["wait", "borrow"],
        patience_s: float,
        replan: Broadcast,
        changed: Broadcast,
        log: FilteringBoundLogger,
    ) -> None:
        self._mixer = mixer
        self._ledger = ledger
        self._waits = waits
        self._policy = policy
        self._patience_s = patience_s
        self._replan = replan
        self._changed = changed
        self._log = log

    @property
    def period_s(self) -> float:
        """Seconds from one look to the next."""
        return max(FIRST_WORD_S, self._patience_s)

    async def run(self, explain: Explain, *, task_status: TaskStatus[None]) -> None:
        """Watch until cancelled; ``explain`` gives a cause, with a ``sentence``."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._watch, self._waits.for_engines, explain)
            tasks.start_soon(self._watch, self._waits.for_trainer, explain)
            task_status.started()

    async def _watch(self, wait: Wait, explain: Explain) -> None:
        while True:
            await wait.begun.wait()
            wait.begun = anyio.Event()
            with anyio.CancelScope() as wait.watched:  # ended when another batch is waited for
                if wait is self._waits.for_engines:
                    await self._lend(wait.step)
                await self._tell(wait, explain)

    async def _lend(self, step: int) -> None:
        """When patience is over, others may stand in."""
        await anyio.sleep_until(self._waits.for_engines.since + self._patience_s)
        if self._policy == "borrow" and self._is_short(step) is not None:
            self._mixer.allow_borrowing(step)
            self._replan.notify()
            self._changed.notify()

    async def _tell(self, wait: Wait, explain: Explain) -> None:
        """Say every cause of this wait once, for as long as it lasts."""
        said: dict[Any, float] = {}  # when each was
        step, next_look = wait.step, wait.since + self.period_s
        while True:
            await anyio.sleep_until(next_look)
            now = anyio.current_time()
            next_look = now + self.period_s
            why = self._is_short(step) if wait is self._waits.for_engines else wait.why
            if why is None or self._ledger.step != step:
                return
            if not wait.count:
                continue
            cause = explain(why)
            what = (cause["kind"], *((entry["source"], entry["kind"]) for entry in cause["sources"]))
            if now - said.get(what, -LONGEST_SILENCE_S) >= LONGEST_SILENCE_S:
                said[what], wait.is_told = now, True
                waited = f"waiting {now - wait.since:.0f} s for a batch"
                self._log.warning(f"{waited}: {cause['sentence']}", action="batch_late", cause=cause)

    def _is_short(self, step: int) -> Shortage | None:
        """What the batch of the step lacks; ``None`` if it is there, or if a load has taken the run to another one."""
        if self._ledger.step != step:
            return None
        outlook = self._mixer.outlook()
        return outlook if isinstance(outlook, Shortage) else None

    def statistics(self) -> StarvationStatistics:
        """How the wait for the next batch stands."""
        wait = self._waits.for_engines
        waits = wait.step == self._ledger.step and isinstance(self._mixer.outlook(), Shortage)
        return StarvationStatistics(
            policy=self._policy,
            patience_s=self._patience_s,
            waiting_s=round(anyio.current_time() - wait.since, 3) if waits else None,
            waiting=wait.count + self._waits.for_trainer.count,
            is_borrowing=self._mixer.is_borrowing,
        )
