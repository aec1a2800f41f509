"""Watches batches that are waited for: says why in the log, and lets others stand in when patience is over.

Invariants:

* A wait begins when the first ``get_batch`` finds a batch of a step that cannot be formed, and ends when that batch
  forms; asking again with a short deadline does not begin it anew.
* Once patience is over the cause is logged, and again each time that the wait has doubled, at most
  :data:`LONGEST_SILENCE_S` apart, as long as somebody waits (G8).
* Under ``borrow`` others may stand in from then on; under ``wait`` nothing but the log line happens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal

import anyio
from anyio.abc import TaskStatus
from structlog.typing import FilteringBoundLogger

from .broadcast import Broadcast
from .ledger import Ledger
from .mixer import Mixer, Shortage

__all__ = ["Starvation", "StarvationStatistics"]

FIRST_WORD_S: Final = 1.0
"""No line earlier than this, however short the patience: batches that are a moment late are no news."""

LONGEST_SILENCE_S: Final = 600.0
"""A batch that does not come for hours is told of every ten minutes."""


@dataclass(frozen=True, slots=True)
class StarvationStatistics:
    """How the wait for the next batch stands.

    ``waiting_s``: seconds since somebody first waited for it, ``None`` if nobody has; ``is_borrowing``: whether others
    may stand in by now.
    """

    policy: Literal["wait", "borrow"]
    patience_s: float
    waiting_s: float | None
    is_borrowing: bool


class Starvation:
    """See the module's invariants.

    Args:
        mixer: lets others stand in.
        ledger: for the step.
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
        policy: Literal["wait", "borrow"],
        patience_s: float,
        replan: Broadcast,
        changed: Broadcast,
        log: FilteringBoundLogger,
    ) -> None:
        self._mixer = mixer
        self._ledger = ledger
        self._policy = policy
        self._patience_s = patience_s
        self._replan = replan
        self._changed = changed
        self._log = log
        self._step = -1
        self._since = 0.0
        self._waiting = 0
        self._begun = anyio.Event()
        self._watched = anyio.CancelScope()

    @contextmanager
    def waiting(self, step: int) -> Iterator[None]:
        """Somebody waits for the batch of this step, which cannot be formed now."""
        if self._step != step:
            self._step, self._since = step, anyio.current_time()
            self._begun.set()
            self._watched.cancel()
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1

    async def run(self, explain: Callable[[Shortage], dict[str, Any]], *, task_status: TaskStatus[None]) -> None:
        """Watch until cancelled; ``explain`` gives a shortage's cause, with a ``sentence``."""
        task_status.started()
        while True:
            await self._begun.wait()
            self._begun = anyio.Event()
            with anyio.CancelScope() as self._watched:  # ended when another batch is waited for
                await self._watch(self._step, explain)

    async def _watch(self, step: int, explain: Callable[[Shortage], dict[str, Any]]) -> None:
        """Until the batch of the step is there."""
        await anyio.sleep_until(self._since + self._patience_s)
        if self._policy == "borrow" and self._is_short(step) is not None:
            self._mixer.allow_borrowing(step)
            self._replan.notify()
            self._changed.notify()
        silence_s = max(FIRST_WORD_S, self._patience_s)
        await anyio.sleep_until(self._since + silence_s)
        while (shortage := self._is_short(step)) is not None:
            if self._waiting:
                cause, waited = explain(shortage), anyio.current_time() - self._since
                self._log.warning(f"a batch is waited for since {waited:.0f} s: {cause['sentence']}", cause=cause)
            await anyio.sleep(silence_s)
            silence_s = min(LONGEST_SILENCE_S, 2 * silence_s)

    def _is_short(self, step: int) -> Shortage | None:
        """What the batch of the step lacks; ``None`` if it is there, or if a load has taken the run to another one."""
        if self._ledger.step != step:
            return None
        outlook = self._mixer.outlook()
        return outlook if isinstance(outlook, Shortage) else None

    def statistics(self) -> StarvationStatistics:
        """How the wait for the next batch stands."""
        waits = self._step == self._ledger.step and isinstance(self._mixer.outlook(), Shortage)
        return StarvationStatistics(
            policy=self._policy,
            patience_s=self._patience_s,
            waiting_s=round(anyio.current_time() - self._since, 3) if waits else None,
            is_borrowing=self._mixer.is_borrowing,
        )
