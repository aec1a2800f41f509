"""Prompt sources that are tasks of the package reasoning-gym: entries made on demand, in worker processes.

Invariants:

* An entry is made again whenever it is asked for, and is the same each time (``reasoning_tasks``).
* Making one takes 0.1 ms to 2 s, by task, and may hang: it never runs in the daemon's loop, has a deadline, and costs
  its process where it outlives that.
* Each prompt carries in its metadata, beside the entry's own, what its entry is made from: the reward ``reasoning_gym``
  needs nothing else.
"""

from __future__ import annotations

import importlib.util
from typing import Final, Self

import anyio

from orchestrator.concurrency.processes import ProcessFailed, ProcessPool, ServiceRefused
from orchestrator.concurrency.processes.messages import encode_message
from orchestrator.concurrency.processes.reasoning_tasks import HASH_SEED, INSTALL_HINT, PREFIX, TaskSpec
from orchestrator.errors import PromptFileError, PromptUnavailable
from orchestrator.prompts.order import PromptOrder
from orchestrator.records import Prompt

__all__ = ["ReasoningPrompts"]

SERVICE: Final = "orchestrator.prompts.reasoning.worker.serve"

PROCESSES: Final = 2
"""At a time for one source; each prompt is the work of a whole group, which takes far longer than making it."""

ENTRY_TIMEOUT_S: Final = 60.0
"""The slowest entry that was seen took 2.2 s on a slow core."""


class ReasoningPrompts:
    """A :class:`~orchestrator.prompts.port.PromptSource` over the entries of one task; made by :meth:`open`."""

    def __init__(self, name: str, spec: TaskSpec, order: PromptOrder, epochs: int | None) -> None:
        self._name = name
        self._spec = spec
        self._order = order
        self._epochs = epochs
        self._limiter = anyio.CapacityLimiter(PROCESSES)
        self._pool = ProcessPool(SERVICE, spec.as_json(), timeout_s=ENTRY_TIMEOUT_S, environment=HASH_SEED)

    @classmethod
    async def open(cls, name: str, spec: TaskSpec, *, shuffle: bool, epochs: int | None, seed: int) -> Self:
        """Start a process, and make the first entry.

        Raises:
            PromptFileError: the package is not installed, there is no such task, or it refuses its options.
            ValueError: ``epochs`` or ``seed`` out of range.
        """
        if epochs is not None and epochs < 1:
            raise ValueError(f"epochs is {epochs}, but must be at least 1, or null for no limit")
        if importlib.util.find_spec("reasoning_gym") is None:
            raise PromptFileError(f"{PREFIX}{spec.task}: it {INSTALL_HINT}")
        order = PromptOrder(seed=seed, name=name, rows=spec.size, shuffle=shuffle)
        source = cls(name, spec, order, epochs)
        try:
            await source.read(0, 0)
        except PromptUnavailable as error:
            await source.aclose()
            raise PromptFileError(f"{PREFIX}{spec.task}: {error.message}") from error
        except BaseException:
            await source.aclose()
            raise
        return source

    @property
    def name(self) -> str:
        """The source's name."""
        return self._name

    @property
    def epochs(self) -> int | None:
        """How often the prompts are gone through; ``None``: for ever."""
        return self._epochs

    def __len__(self) -> int:
        return self._spec.size

    def row_at(self, epoch: int, position: int) -> int:
        """The entry that stands at ``position`` of the order of ``epoch`` (see ``order.py``)."""
        return self._order.row_at(epoch, position)

    async def read(self, prompt_index: int, epoch: int) -> Prompt:
        """The prompt of that entry.

        Raises:
            IndexError: there is no such entry.
            PromptUnavailable: the task raised, hung, or ended its process.
        """
        if not 0 <= prompt_index < len(self):
            raise IndexError(f"source {self._name} has no entry {prompt_index}, only entries 0 to {len(self) - 1}")
        async with self._limiter:
            try:
                answer = await self._pool.call(encode_message({"index": prompt_index}))
            except ServiceRefused as error:
                raise PromptUnavailable(error.message) from error
            except ProcessFailed as error:
                raise PromptUnavailable(self._failed(prompt_index, error.message)) from error
        if "error" in answer:
            raise PromptUnavailable(self._failed(prompt_index, answer["error"]))
        metadata = {**answer["metadata"], "reasoning_gym": self._spec.as_json()}
        return Prompt(self._name, prompt_index, epoch, answer["question"], answer["answer"], metadata)

    def _failed(self, prompt_index: int, why: str) -> str:
        return f"cannot create entry {prompt_index} of {PREFIX}{self._spec.task}: {why}"

    async def aclose(self) -> None:
        """Kill the processes."""
        await self._pool.aclose()
