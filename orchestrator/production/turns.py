"""The port between a group and the engines: how one sample is taken from its prompt to its end.

Today a sample is one turn: one response of the model. An agent's sample has many, with what tools answered between
them; what takes it through these is another implementation of :class:`TurnLoop`.

Invariants:

* A sample only grows: :meth:`EnginePool.turn <orchestrator.engines.EnginePool.turn>` adds what the model says, and
  ``Sample.append_context`` what it did not say (version -1, log-probability 0, loss mask 0).
* A sample is all that a restart has. A loop that is given a sample with tokens goes on from there, and finds out from
  the sample alone which turn it is in: ``Sample.turn_begin``, the runs of its versions, its metadata.
* Until the loop ends the sample, its status is ``pending``; a cancellation at any moment leaves a sample that can be
  stored and gone on with.
"""

from __future__ import annotations

from array import array
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from orchestrator.engines import EnginePool, SamplingParams
from orchestrator.records import Message, Prompt, Sample

__all__ = ["SampleTask", "SingleTurn", "TurnLoop"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleTask:
    """One sample that is to be finished.

    ``prompt_tokens`` [P] are the token ids of the prompt, empty where engines give text alone: these get ``messages``.
    ``sampling.max_new_tokens`` is for the whole sample. ``trial`` counts the attempts at it, from 0.

    ``before_request`` is to be called before each request: the sample may be too old to go on with, and its group is
    cancelled then. ``store`` is to be awaited whenever the sample has gained something that a restart should keep.
    """

    sample: Sample
    prompt: Prompt
    prompt_tokens: array[int]
    messages: Sequence[Message] | None
    sampling: SamplingParams
    trial: int
    before_request: Callable[[Sample], None]
    store: Callable[[Sample], Awaitable[None]]


class TurnLoop(Protocol):
    """Finishes samples of one source; see the module's invariants."""

    async def finish(self, task: SampleTask) -> None:
        """Return when the sample is completed or truncated, with its text.

        Raises:
            GenerationFailed: it cannot be finished; the caller replaces it or drops its group.
        """
        ...


class SingleTurn:
    """A :class:`TurnLoop` of one turn: a sample is one response of the model.

    Args:
        pool: the engines.
    """

    def __init__(self, pool: EnginePool) -> None:
        self._pool = pool

    async def finish(self, task: SampleTask) -> None:
        """See :meth:`TurnLoop.finish`."""
        await self._pool.generate(
            task.sample,
            task.prompt_tokens,
            task.sampling,
            messages=task.messages,
            before_piece=task.before_request,
            after_piece=task.store,
            trial=task.trial,
        )
