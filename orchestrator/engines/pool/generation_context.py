"""What a generation is given: what is asked for, and what it works with."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from structlog.typing import FilteringBoundLogger

from orchestrator.engines.port import SamplingParams
from orchestrator.records import Message, Sample

from .exchange import ExchangeSettings
from .requests_in_flight import RequestsInFlight
from .slots import Slots

__all__ = ["Asked", "GenerationContext", "GenerationSettings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationSettings:
    """What the config says of generations; see :class:`~orchestrator.engines.pool.pool.EnginePool`."""

    exchange: ExchangeSettings
    max_retries: int
    chunk_tokens: int | None
    keep_partials: bool
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is wanted; see :meth:`~orchestrator.engines.pool.pool.EnginePool.generate`."""

    sample: Sample
    prompt_tokens: Sequence[int]
    messages: Sequence[Message] | None
    sampling: SamplingParams
    trial: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationContext:
    """What a generation works with, all of it the pool's.

    ``end_ids`` are the tokens that end a sequence, as far as known; ``detokenize`` is for text that no stream gave
    whole.
    """

    settings: GenerationSettings
    slots: Slots
    requests: RequestsInFlight
    detokenize: Callable[[Sequence[int]], Awaitable[str]]
    end_ids: Callable[[], tuple[int, ...]]
    jitter: random.Random
    log: FilteringBoundLogger
