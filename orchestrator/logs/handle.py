"""The daemon's handle for logging: loggers, the lines of each step, rotation, closing.

Invariants:

* The only global state is one handler at the root of the standard library's ``logging``, which forwards warnings and
  errors of libraries. ``close`` removes it.
* Logging neither blocks nor raises; see ``writer`` and ``lines``.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Protocol, TextIO

import structlog
from structlog.typing import FilteringBoundLogger

from orchestrator.core.ledger.events import Event

from .lines import ConsoleLines, EcsLines
from .recent import RecentEvents
from .record_lines import journal_line, level_of
from .writer import FLUSH_DEADLINE_S, LogWriter, Sink

__all__ = ["LEVELS", "LogHandle", "StepFigures", "configure_logging"]

LEVELS: Final = ("debug", "info", "warning", "error", "critical")
"""The values of ``level``, from the most lines to the fewest."""


class StepFigures(Protocol):
    """The metrics of one step; ``orchestrator.status`` makes them."""

    @property
    def step(self) -> int:
        """The step whose batch was formed."""
        ...

    @property
    def policy_version(self) -> int:
        """The policy version at that step."""
        ...

    @property
    def trainer_wait_s(self) -> float:
        """How long the trainer waited for the batch."""
        ...

    @property
    def sources(self) -> Mapping[str, Mapping[str, Any]]:
        """Nested numbers by source."""
        ...

    @property
    def slashed(self) -> Mapping[str, float]:
        """The same as one flat mapping of slashed names. It is read more than once, so it must be cheap."""
        ...


def configure_logging(
    *,
    file: Path | None,
    level: str,
    service: str = "rollout-orchestrator",
    stream: TextIO | None = None,
    json: bool = False,
    run: str | None = None,
) -> LogHandle:
    """Start logging to a file or to a stream.

    Lines are ECS JSON. On a terminal they are text for people, unless ``json`` is set.

    Args:
        file: appended to; created with its directory if missing; ``None`` for the stream.
        level: one of ``LEVELS``; lines below it are not made.
        service: ``service.name`` of every line.
        stream: has a file descriptor, which is duplicated; ``None`` for standard output.
        json: JSON on a terminal too.
        run: ``labels.run`` of every line, which tells the runs of one index apart.

    Raises:
        StateError: the file cannot be opened.
        ValueError: unknown level.
    """
    if level not in LEVELS:
        raise ValueError(f"unknown log level {level!r}; use one of {', '.join(LEVELS)}")
    sink = Sink(file, sys.stdout if stream is None else stream)
    is_text = sink.is_terminal and not json
    return LogHandle(
        sink, ConsoleLines(colors=True) if is_text else EcsLines(service, run), level=level, is_text=is_text
    )


class LogHandle:
    """Made by :func:`configure_logging`; owns the writer, its thread, and the handler of the libraries' lines."""

    def __init__(self, sink: Sink, lines: EcsLines | ConsoleLines, *, level: str, is_text: bool) -> None:
        self._lines = lines
        self._is_text = is_text
        self.recent = RecentEvents()
        self._writer = LogWriter(sink, self._loss)
        self._root = self._wrapped(self._writer.offer, level)
        self._routine = self._wrapped(self._writer.offer_later, level)
        self._handler = _LibraryHandler(self.logger("library"))
        logging.getLogger().addHandler(self._handler)

    def _wrapped(self, offer: Callable[[bytes], None], level: str) -> FilteringBoundLogger:
        return structlog.wrap_logger(  # type: ignore[no-any-return]
            _Outlet(offer),
            processors=[self.recent, self._lines],
            wrapper_class=structlog.make_filtering_bound_logger(level),
            context_class=dict,
            cache_logger_on_first_use=False,
        ).bind()

    def logger(self, dataset: str, **fields: Any) -> FilteringBoundLogger:
        """A logger whose lines carry ``event.dataset`` and the fields; see ``lines`` for those with short names."""
        return self._root.bind(dataset=dataset, **fields)

    def routine(self, dataset: str) -> FilteringBoundLogger:
        """The same for lines whose facts the state has as well, so that they may reach the disk later."""
        return self._routine.bind(dataset=dataset)

    def step(self, figures: StepFigures) -> None:
        """The lines of one step.

        There is one line a source with nested numbers, one line with the slashed names of all sources, and one line for
        each source and reason for which groups were dropped. ``rollout`` holds the nested numbers, ``metrics`` the
        slashed ones. An index has to map ``metrics`` and ``rollout.dropped`` as ``flattened``, or each name becomes a
        field; this is why drops have lines of their own. On a terminal there is one line of text.

        All lines are made and queued together: a logger for each would cost as much as the lines.
        """
        if self._root.is_enabled_for(logging.INFO):
            self._writer.offer_later(*[self._lines(None, "info", event) for event in self._step_events(figures)])

    def _step_events(self, figures: StepFigures) -> Iterator[dict[str, Any]]:
        where = {"step": figures.step, "policy_version": figures.policy_version}
        if not self._is_text:
            for name, numbers in figures.sources.items():
                yield from _source_events(f"step {figures.step}, source {name}", name, where, numbers)
        shares = ", ".join([f"{name} {_share(numbers)}" for name, numbers in figures.sources.items()])
        yield {
            "event": f"step {figures.step}: {shares}",
            "dataset": "step",
            "rollout": {**where, "trainer_wait_s": figures.trainer_wait_s},
            "metrics": figures.slashed,
        }

    def recorded(self, event: Event) -> None:
        """Log an event that was written to the state log; not on a terminal."""
        level = level_of(event)
        if not self._is_text and self._root.is_enabled_for(level):
            line = self._lines(None, logging.getLevelName(level).lower(), journal_line(event))
            self._writer.offer_later(line)

    def reopen(self) -> None:
        """Continue in a new file of the same name, after the old one was renamed; returns at once."""
        self._writer.reopen()

    def close(self, deadline_s: float = FLUSH_DEADLINE_S) -> None:
        """Write what is queued, for at most ``deadline_s`` seconds, and close; calling it again is harmless."""
        logging.getLogger().removeHandler(self._handler)
        self._writer.close(deadline_s)

    def _loss(self, lost: int, why: str) -> bytes:
        event = {"event": f"{lost} log lines were lost: {why}" if lost else why, "dataset": "logs"}
        return self._lines(None, "warning", {**event, "logging": {"lost_lines": lost}})


def _source_events(
    what: str, source: str, where: Mapping[str, Any], numbers: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    yield {"event": what, "dataset": "step.source", "source": source, "rollout": {**where, **numbers}}
    for reason, groups in numbers.get("dropped", {}).items():
        if groups:
            yield {
                "event": f"{what}: {_groups(groups)} dropped, {reason}",
                "dataset": "step.drop",
                "source": source,
                "rollout": where,
                "drop": {"reason": reason, "groups": groups},
            }


def _share(numbers: Mapping[str, Any]) -> str:
    return f"{_groups(numbers.get('group_count', '?'))} (weight {numbers.get('weight', float('nan')):.3g})"


def _groups(count: Any) -> str:
    return "1 group" if count == 1 else f"{count} groups"


class _Outlet:
    """The last step of structlog's chain: the method of every level takes the finished line."""

    def __init__(self, offer: Callable[[bytes], None]) -> None:
        self.debug = self.info = self.warning = self.error = self.critical = offer


class _LibraryHandler(logging.Handler):
    """Forwards what libraries log through the standard library, from ``warning`` up."""

    def __init__(self, log: FilteringBoundLogger) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        """Forward one record."""
        level = min(max(record.levelno // 10 * 10, logging.WARNING), logging.CRITICAL)
        try:
            message = record.getMessage()
        except (TypeError, ValueError, KeyError):  # the arguments do not fit the message: log both
            message = f"{record.msg} {record.args}"
        self._log.log(level, message, exc_info=record.exc_info, **{"log.logger": record.name})
