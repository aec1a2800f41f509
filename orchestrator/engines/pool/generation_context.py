"""What a generation is given: what is asked for, and what it works with."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from structlog.typing import FilteringBoundLogger

from orchestrator.engines.port import SamplingParams
from orchestrator.records import Message, Sample

from .exchange import ExchangeSettings
from .member import Member
from .requests_in_flight import RequestsInFlight
from .slots import Slots

__all__ = ["GenerationContext", "GenerationSettings", "TurnEnd", "TurnRequest"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationSettings:
    """What the config says of generations; see :class:`~orchestrator.engines.pool.pool.EnginePool`."""

    exchange: ExchangeSettings
    max_retries: int
    chunk_tokens: int | None
    keep_partials: bool
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnRequest:
    """One turn of a sample: what is to be generated behind its first ``begin`` tokens.

    What the sample has beyond ``begin`` was generated for this turn before, and is gone on with. ``prompt_tokens`` [P]
    are the token ids of the prompt; none for engines that give text alone, which are given it as the chat ``messages``.
    ``sampling.max_new_tokens`` counts this turn. ``trial`` counts the attempts at the sample, from 0: another one is
    drawn with other seeds. ``engine``: the name of the one that holds the turns before, which is asked first.
    """

    sample: Sample
    prompt_tokens: Sequence[int]
    sampling: SamplingParams
    messages: Sequence[Message] | None = None
    begin: int = 0
    trial: int = 0
    engine: str | None = None


class TurnEnd(NamedTuple):
    """How a turn ended: ``stop`` or ``length``, its text, and the engine that generated its last tokens, if known."""

    reason: Literal["stop", "length"]
    text: str
    engine: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationContext:
    """What a generation works with, all of it the pool's.

    ``end_ids`` are the tokens that end a sequence, as far as known; ``detokenize`` is for text that no stream gave
    whole; ``named`` is the engine of that name, if it is there.
    """

    settings: GenerationSettings
    slots: Slots
    requests: RequestsInFlight
    detokenize: Callable[[Sequence[int]], Awaitable[str]]
    end_ids: Callable[[], tuple[int, ...]]
    named: Callable[[str], Member | None]
    jitter: random.Random
    log: FilteringBoundLogger
