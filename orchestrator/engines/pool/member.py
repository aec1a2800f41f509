"""One engine of the pool: the adapter, its health, what it holds, and its counts."""

from __future__ import annotations

from dataclasses import dataclass, field

import anyio

from orchestrator.engines.port import Engine, EngineInfo

from .health import Health
from .held_parameters import HeldParameters
from .lateness import FirstToken

__all__ = ["EngineStatistics", "Member", "RequestCounts", "Watch"]


@dataclass(frozen=True, slots=True)
class EngineStatistics:
    """One engine as ``status`` shows it; counts are of requests since the start.

    ``state``: ``up``, ``trial`` (one request at a time, to see whether it works again), ``down``, ``outdated`` (not
    known to hold the policy version in force), ``updating`` (its parameters are being changed), ``draining`` (no new
    requests, as asked for). ``completed`` requests ended as they should; ``failed`` by the engine's fault, ``stalled``
    of them without a word; ``late`` ones were moved because their first token did not come in time; ``interrupted``
    ones were cut by us. ``tokens`` counts tokens received. ``first_token_s`` is the smoothed mean of seconds from a
    request to its first token. ``last_error`` is the newest failure in words. ``policy_version`` is what the engine is
    known to hold.
    """

    name: str
    state: str
    in_flight: int
    max_in_flight: int
    completed: int
    failed: int
    stalled: int
    late: int
    interrupted: int
    tokens: int
    first_token_s: float | None
    last_error: str | None
    model: str | None
    policy_version: int | None


@dataclass(slots=True)
class RequestCounts:
    """How requests ended, and the tokens received; see :class:`EngineStatistics`."""

    completed: int = 0
    failed: int = 0
    stalled: int = 0
    late: int = 0
    interrupted: int = 0
    tokens: int = 0


@dataclass(slots=True)
class Watch:
    """The task that owns an engine and probes it.

    ``scope`` ends it; ``woken`` wakes it while it rests, and ``is_probe_due`` says that the engine is to be probed now.
    """

    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    woken: anyio.Event = field(default_factory=anyio.Event)
    is_probe_due: bool = True


@dataclass(slots=True, eq=False)
class Member:
    """One engine of the pool.

    ``required`` is the policy version that it has to hold to be given work; ``None``: none was ever set.
    ``is_draining`` and ``is_updating`` keep new requests away; ``updates`` counts those who want to change its
    parameters, one of whom holds ``loading``. ``silent_s``: see ``requests_in_flight``.
    """

    engine: Engine
    held: HeldParameters = field(default_factory=HeldParameters)
    health: Health = field(default_factory=Health, init=False)
    first_token: FirstToken = field(default_factory=FirstToken, init=False)
    watch: Watch = field(default_factory=Watch, init=False)
    counts: RequestCounts = field(default_factory=RequestCounts, init=False)
    info: EngineInfo | None = field(default=None, init=False)
    required: int | None = field(default=None, init=False)
    is_draining: bool = field(default=False, init=False)
    updates: int = field(default=0, init=False)
    loading: anyio.Lock = field(default_factory=anyio.Lock, init=False)
    silent_s: float = field(default=0.0, init=False)
    in_flight: int = field(default=0, init=False)

    @property
    def name(self) -> str:
        """Of the engine."""
        return self.engine.name

    @property
    def is_updating(self) -> bool:
        """Whether its parameters are being changed, or are about to be."""
        return self.updates > 0

    @property
    def state(self) -> str:
        """See :class:`EngineStatistics`."""
        if self.is_updating:
            return "updating"
        if self.is_draining:
            return "draining"
        if self.health.is_up and not self.held.is_current(self.required):
            return "outdated"
        return self.health.state

    @property
    def may_work(self) -> bool:
        """Whether new requests may go to it at all."""
        return (
            self.health.is_up and not self.is_draining and not self.is_updating and self.held.is_current(self.required)
        )

    @property
    def is_at_work(self) -> bool:
        """Whether it takes more than a trial."""
        return self.may_work and self.health.state == "up"

    @property
    def room(self) -> int:
        """Requests that may be sent now."""
        if not (self.may_work and self.health.takes_requests):
            return 0
        free = self.engine.max_in_flight - self.in_flight
        return min(free, 1) if self.health.state == "trial" else max(free, 0)

    @property
    def load(self) -> float:
        """Share of the slots in use."""
        return self.in_flight / self.engine.max_in_flight

    @property
    def is_text_only(self) -> bool:
        """Whether it gives text alone."""
        return self.info is not None and self.info.text_only

    def probe_soon(self) -> None:
        """Have it probed now."""
        self.watch.is_probe_due = True
        self.watch.woken.set()

    def went_wrong(self, is_down_now: bool) -> bool:
        """After a failure of a request: have its watch look when to probe it next. Returns what it was given."""
        if is_down_now:
            self.watch.woken.set()
        return is_down_now

    def taken(self) -> None:
        """One more request."""
        self.in_flight += 1
        self.health.request_sent()

    def left(self) -> None:
        """One less."""
        self.in_flight -= 1
        self.health.request_left()

    def statistics(self) -> EngineStatistics:
        """As it is now."""
        return EngineStatistics(
            name=self.name,
            state=self.state,
            in_flight=self.in_flight,
            max_in_flight=self.engine.max_in_flight,
            completed=self.counts.completed,
            failed=self.counts.failed,
            stalled=self.counts.stalled,
            late=self.counts.late,
            interrupted=self.counts.interrupted,
            tokens=self.counts.tokens,
            first_token_s=self.first_token.mean_s if self.first_token.seen else None,
            last_error=self.health.last_error,
            model=self.info.model if self.info is not None else None,
            policy_version=self.held.version,
        )
