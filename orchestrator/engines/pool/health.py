"""Whether an engine is used: a circuit breaker, as a pure state machine over what its probes and requests report.

* ``up``: as many requests as it takes.
* ``down``: none. After a failed probe, and after ``MAX_IN_A_ROW`` requests in a row that failed or whose first token
  came late.
* ``trial``: one request at a time (the breaker is half open). An engine that went down by its requests comes back this
  way, because a probe that succeeds says little of generating; the first good sign of a request closes the breaker.

Invariants:

* Only a probe that succeeds ends ``down``. Engines that keep failing their trials are tried ever more rarely, at most
  ``MAX_REST_S`` apart.
* No clock and no I/O: the pool reports facts and asks for the state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

__all__ = ["MAX_IN_A_ROW", "Health", "HealthState"]

HealthState = Literal["up", "trial", "down"]

MAX_IN_A_ROW: Final = 3
"""One failure may be the request's own bad luck; three in a row are the engine's."""

HEALTH_CHECK_INTERVAL_S: Final = 5.0
"""While an engine is up its requests say how it is; the probe finds an idle one that died."""

DOWN_CHECK_INTERVAL_S: Final = 1.0
"""An engine that comes back is used within a second."""

MAX_REST_S: Final = 30.0
"""Between trials: each costs one sample a detour."""


@dataclass(slots=True)
class Health:
    """The health of one engine.

    ``last_error`` is the newest failure in words; ``is_reachable`` what the last probe said; ``rests`` counts how often
    it went down by its requests without a request that ended well since.
    """

    state: HealthState = "down"
    is_reachable: bool = False
    last_error: str | None = None
    rests: int = 0
    _failed_in_a_row: int = 0
    _late_in_a_row: int = 0
    _is_trial_free: bool = False

    @property
    def is_up(self) -> bool:
        """Whether anything may be sent to it."""
        return self.state != "down"

    @property
    def check_after_s(self) -> float:
        """Seconds until the next probe."""
        if self.state != "down":
            return HEALTH_CHECK_INTERVAL_S
        return min(MAX_REST_S, DOWN_CHECK_INTERVAL_S * float(1 << min(max(0, self.rests - 1), 10)))

    # -- slots ---------------------------------------------------------------------------------------------------------

    @property
    def takes_requests(self) -> bool:
        """Whether one more request may be sent, as far as its health goes."""
        return self.state == "up" or (self.state == "trial" and self._is_trial_free)

    def request_sent(self) -> None:
        """A request was given to it."""
        self._is_trial_free = False

    def request_left(self) -> None:
        """A request is over; if it was a trial without a verdict, there may be another."""
        self._is_trial_free = True

    # -- what is reported ----------------------------------------------------------------------------------------------

    def probe_succeeded(self) -> bool:
        """A probe succeeded; whether the engine was down before."""
        self.is_reachable = True
        if self.state != "down":
            return False
        self.state = "trial" if self.rests else "up"
        self._failed_in_a_row = self._late_in_a_row = 0
        self._is_trial_free = True
        return True

    def probe_failed(self, message: str) -> bool:
        """A probe failed; whether the engine was up before."""
        was_up, self.state = self.is_up, "down"
        self.is_reachable = False
        self.last_error = message
        return was_up

    def first_token_in_time(self) -> None:
        """A first token came when it should."""
        self._late_in_a_row = 0
        self._close()

    def request_succeeded(self) -> None:
        """A request ended as it should, or was interrupted by us after something had come of it."""
        self._failed_in_a_row = 0
        self.rests = 0
        self._close()

    def request_failed(self, message: str) -> bool:
        """A request failed by the engine's fault; whether that took the engine down."""
        self._failed_in_a_row += 1
        return self._went_wrong(message, self._failed_in_a_row)

    def request_late(self, message: str) -> bool:
        """A first token did not come in time; whether that took the engine down."""
        self._late_in_a_row += 1
        return self._went_wrong(message, self._late_in_a_row)

    def _went_wrong(self, message: str, in_a_row: int) -> bool:
        self.last_error = message
        if self.state == "trial" or (self.state == "up" and in_a_row >= MAX_IN_A_ROW):
            self.state = "down"
            self.rests += 1
            return True
        return False

    def _close(self) -> None:
        if self.state == "trial":
            self.state = "up"
