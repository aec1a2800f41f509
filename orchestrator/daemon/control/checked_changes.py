"""What every change of the config in force goes through, whoever asks for it.

Invariants:

* One change at a time, and none while the daemon drains.
* What is to be in force is checked wholly first, as ``check`` does it.
* A refusal is logged, and everything stays as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import anyio
import anyio.to_thread
from structlog.typing import FilteringBoundLogger

from orchestrator.config import Config
from orchestrator.config.examine import examine
from orchestrator.config.text import Finding
from orchestrator.errors import BadRequest, OrchestratorError, ShuttingDown

from .run import RunControl

__all__ = ["CheckedChanges", "as_request"]


class CheckedChanges:
    """See the module's invariants.

    Args:
        control: for whether the daemon is draining.
        directory: where dotted paths are looked up first.
        log: for refusals and warnings.
    """

    def __init__(self, *, control: RunControl, directory: Path, log: FilteringBoundLogger) -> None:
        self._control = control
        self._directory = directory
        self._log = log
        self._is_changing = False

    @contextmanager
    def change(self, what: str) -> Iterator[None]:
        """Enclose one change; what it raises is logged, with ``what`` was refused.

        Raises:
            BadRequest: another change is under way.
            ShuttingDown: the daemon is draining.
        """
        if self._is_changing:
            raise BadRequest("another change of the config is in progress; try again when it is done")
        if self._control.is_draining:
            raise ShuttingDown("the daemon is draining; restart it first")
        self._is_changing = True
        try:
            yield
        except OrchestratorError as error:
            self._log.error(f"{what} was refused, nothing changed: {error}", action="reload_refused")
            raise
        finally:
            self._is_changing = False

    async def examine(self, config: Config, error: Callable[[Iterable[Finding]], OrchestratorError]) -> dict[str, int]:
        """How many prompts each source has, once everything that the config names can be used; ``error`` if it cannot.

        Raises:
            OrchestratorError: what ``error`` makes of everything that is wrong.
        """
        # A loop of its own: evaluating the weights of the coming steps takes a while.
        look = partial(anyio.run, partial(examine, config, directory=self._directory))
        found = await anyio.to_thread.run_sync(look)
        if found.findings:
            raise error(found.findings)
        for warning in found.warnings:
            self._log.warning(warning)
        return found.prompts


def as_request(findings: Iterable[Finding]) -> OrchestratorError:
    """What is wrong, where no file says it but a request."""
    return BadRequest("; ".join(finding.message for finding in findings))
