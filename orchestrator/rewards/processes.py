"""Rewards that are functions run in worker processes: synchronous ones of the user's, and those of packages.

Invariants:

* Hanging or crashing costs that process and that call. Neither waiting for a turn nor the start of a process is part
  of the deadline of a call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from orchestrator.concurrency.processes import ProcessFailed, ProcessPool, ProcessTimeout, ServiceRefused
from orchestrator.errors import RewardError, RewardTimeout
from orchestrator.records import Prompt, Sample

from .bounded import BoundedReward
from .port import RewardResult, RewardStatistics
from .wire import encode_call

__all__ = ["ProcessReward"]

SERVICE = "orchestrator.rewards.service.serve"


class ProcessReward(BoundedReward):
    """A :class:`~orchestrator.rewards.port.Reward` that calls a function in worker processes.

    Processes are started when calls need them, at most ``concurrency``, and are used again until they fail, are
    cancelled in a call, or the reward is closed. Cancelling a call kills its process.

    Args:
        name: what the config calls it.
        function: its dotted path.
        directory: where the path is looked up beside ``sys.path``; ``None``: nowhere else.
        key: which entry of a returned dictionary is the reward.
        timeout_s: deadline of one call in seconds.
        concurrency: processes, and so calls at a time.
        group: whether the function takes all samples of a group.
        environment: variables that the processes have beside the daemon's own.
    """

    def __init__(
        self,
        name: str,
        *,
        function: str,
        directory: Path | None,
        key: str | None,
        timeout_s: float,
        concurrency: int,
        group: bool,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(name, "process", concurrency=concurrency, group=group)
        options = {
            "name": name,
            "function": function,
            "directory": None if directory is None else str(directory),
            "key": key,
            "group": group,
        }
        self._pool = ProcessPool(SERVICE, options, timeout_s=timeout_s, environment=environment)

    async def _score(self, samples: Sequence[Sample], prompt: Prompt) -> list[RewardResult]:
        try:
            call = encode_call(samples, prompt)
        except (TypeError, ValueError) as error:
            raise RewardError(f"reward {self._name}: it cannot be called: {error}") from error
        try:
            answer = await self._pool.call(call)
        except ServiceRefused as error:
            raise RewardError(f"reward {self._name}: its worker process cannot import it: {error.message}") from error
        except ProcessTimeout as error:
            raise RewardTimeout(f"reward {self._name}: {error.message}") from error
        except ProcessFailed as error:
            raise RewardError(f"reward {self._name}: {error.message}") from error
        if "error" in answer:
            raise RewardError(answer["error"])
        return [RewardResult(value, detail) for value, detail in answer["results"]]

    def statistics(self) -> RewardStatistics:
        """Counts since the start.

        ``extra`` has ``oldest_running_s``, ``waiting`` (calls without a turn yet), ``processes`` (alive) and
        ``processes_started`` (since the start; far above ``concurrency`` when a function keeps hanging or crashing).
        """
        return self._tally.statistics(
            waiting=self._limiter.statistics().tasks_waiting,
            processes=self._pool.alive,
            processes_started=self._pool.started,
        )

    async def aclose(self) -> None:
        """Kill all processes; calls under way fail. The daemon ends its producers first."""
        await self._pool.aclose()
