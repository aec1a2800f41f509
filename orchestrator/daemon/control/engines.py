"""What trainers and people may do to the engines of a running daemon: pauses, versions, parameters, engines themselves.

Invariants:

* A pause has an owner (a connection) and a deadline; it ends with the first of them, or by ``continue_generation``, and
  is not kept over a restart.
* A version is recorded before a token carries it. While parameters are being updated nobody else changes them.
* What is done to an engine at run time is recorded, and in force again after a restart until the file says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import anyio
from anyio.abc import TaskStatus
from structlog.typing import FilteringBoundLogger

from orchestrator.concurrency.broadcast import Broadcast
from orchestrator.config import Config, EngineSpec, engine_as_json, engine_specs, parse_engine
from orchestrator.core.ledger.engine_changes import StartingEngines
from orchestrator.core.ledger.events import EngineAdded, EngineDrained, EngineRemoved, ParametersHeld, VersionSet
from orchestrator.core.ledger.journal import Journal
from orchestrator.core.ledger.ledger import Ledger
from orchestrator.daemon.settings import engine_options
from orchestrator.engines import Engine, EnginePool, ParameterUpdate, UpdateMode
from orchestrator.errors import BadRequest, BatchTimeout, EngineError, UpdateFailed, VersionWentBack

__all__ = ["EngineControl", "record_held", "record_outdated"]


@dataclass(slots=True)
class _Pause:
    owner: int
    timeout_s: float
    since: float


class EngineControl:
    """Implements :class:`~orchestrator.consumer.methods.engines.EngineControl`; see the module's invariants.

    Args:
        config: the whole configuration.
        specs: the engines that the pool has, by name.
        pool: the engines.
        build: makes the adapter of an engine.
        ledger: the run's facts.
        journal: where changes are recorded.
        directory: what relative paths of an added engine are relative to.
        log: for what happened.
    """

    def __init__(
        self,
        *,
        config: Config,
        specs: Mapping[str, EngineSpec],
        pool: EnginePool,
        build: Callable[[EngineSpec], Engine],
        ledger: Ledger,
        journal: Journal,
        directory: Path,
        log: FilteringBoundLogger,
    ) -> None:
        self._config = config
        self._in_file = _by_name(config)
        self._specs = dict(specs)
        self._pool = pool
        self._build = build
        self._ledger = ledger
        self._journal = journal
        self._directory = directory
        self._log = log
        self._pause: _Pause | None = None
        self._pauses = Broadcast()
        self._is_updating = False

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """Hold pauses to their deadlines until cancelled."""
        task_status.started()
        while True:
            changed = self._pauses.next()
            pause = self._pause
            if pause is None:
                await changed.wait()
                continue
            with anyio.move_on_after(pause.timeout_s) as deadline:
                await changed.wait()
            if deadline.cancelled_caught and self._pause is pause:
                self._log.warning(f"a pause of generation ended after its timeout of {pause.timeout_s:g} s")
                self.resume()

    # -- pauses --------------------------------------------------------------------------------------------------------

    @property
    def is_paused(self) -> bool:
        """Whether a pause is in force."""
        return self._pause is not None

    def describe_pause(self) -> str | None:
        """For how long a pause has been in force, in words; ``None`` without one."""
        if self._pause is None:
            return None
        return f"for {anyio.current_time() - self._pause.since:.0f} s (at most {self._pause.timeout_s:g} s)"

    def in_flight(self) -> int:
        """Generations under way."""
        return self._pool.in_flight

    async def pause(self, mode: str, timeout_s: float, owner: int) -> int:
        """Close dispatch and return when the engines are quiet.

        Raises:
            BadRequest: another connection holds a pause.
            BatchTimeout: the engines were not quiet within ``timeout_s``, which ends the pause too.
        """
        if self._pause is not None and self._pause.owner != owner:
            raise BadRequest(
                "another connection has paused generation; the pause ends with that connection or at its timeout"
            )
        self._pause = _Pause(owner, timeout_s, anyio.current_time())
        self._pauses.notify()
        self._pool.pause()
        self._log.info(f"paused generation ({mode}) for at most {timeout_s:g} s", action="generation_paused")
        if mode == "abort":
            self._pool.interrupt()
        with anyio.move_on_after(timeout_s):
            await self._pool.quiet()
            return 0
        raise BatchTimeout(
            f"{self.in_flight()} generations did not finish within {timeout_s:g} s:"
            " use mode abort, or a longer timeout_s"
        )

    def resume(self) -> None:
        """End the pause, if there is one."""
        if self._pause is not None:
            self._log.info(
                f"resumed generation, which was paused {self.describe_pause()}", action="generation_continued"
            )
        self._pause = None
        self._pauses.notify()
        self._pool.resume()

    def is_paused_by(self, owner: int) -> bool:
        """Whether this connection holds a pause."""
        return self._pause is not None and self._pause.owner == owner

    def left(self, owner: int) -> None:
        """A connection closed: its pause ends with it."""
        if self.is_paused_by(owner):
            self._log.warning("a pause of generation ended because its connection closed")
            self.resume()

    # -- versions and parameters ---------------------------------------------------------------------------------------

    async def set_version(self, version: int, mode: str) -> tuple[int, int]:
        """All engines hold this version now, says the trainer; returns how many generations are in flight and were cut.

        Raises:
            BadRequest: parameters are being updated.
            VersionWentBack: it is below the one in force.
        """
        await self._pool.first_probed()  # a trainer is often quicker than engines that start beside it
        self._check_free()
        ledger = self._ledger
        is_same = version == ledger.policy_version and ledger.version_was_set
        if not is_same:
            self._journal.record(VersionSet(version=version))
        self._pool.hold(version, ledger.engine_changes.parameters_path if is_same else None)
        in_flight = self._pool.in_flight
        return in_flight, self._pool.interrupt() if mode == "abort" else 0

    async def update_weights(
        self, update: ParameterUpdate, mode: UpdateMode, *, rolling: bool, timeout_s: float
    ) -> list[dict[str, Any]]:
        """New parameters for every engine; returns how it went at each.

        The version is in force from the moment on at which the first engine holds the parameters.

        Raises:
            BadRequest: parameters are being updated already.
            VersionWentBack: the version is below the one in force.
            UpdateFailed: no engine has them now; the version stays as it was.
        """
        self._check_free()
        if update.version < self._ledger.policy_version:
            raise VersionWentBack(
                f"policy version {update.version} is below {self._ledger.policy_version}, the current one;"
                " it must not decrease"
            )

        def on_first() -> None:
            self._journal.record(VersionSet(version=update.version, path=update.path))

        self._is_updating = True
        try:
            reports = await self._pool.update_parameters(
                update, mode, rolling=rolling, timeout_s=timeout_s, on_first=on_first
            )
        finally:
            self._is_updating = False
        for report in reports:
            if report.error is not None:
                self._log.warning(
                    f"engine {report.engine} does not have policy version {update.version}: {report.error}"
                )
        engines = [asdict(report) for report in reports]
        if not any(report.updated for report in reports):
            why = "; ".join(f"{report.engine}: {report.error}" for report in reports) or "there are no engines"
            raise UpdateFailed(f"no engine loaded {update.path!r}: {why}", data={"engines": engines})
        self._log.info(
            f"policy version {update.version} from {update.path} was loaded by"
            f" {sum(report.updated for report in reports)} of {len(reports)} engines"
        )
        return engines

    def _check_free(self) -> None:
        if self._is_updating:
            raise BadRequest("an update of the engines' parameters is in progress; try again when it is done")

    # -- engines -------------------------------------------------------------------------------------------------------

    def engines(self) -> list[dict[str, Any]]:
        """Every engine as it is now."""
        return [asdict(engine) for engine in self._pool.statistics()]

    async def add(self, raw: Mapping[str, Any]) -> str:
        """One more engine, as a config file would say it; returns its name.

        Raises:
            BadRequest: it would be wrong in a config file too, its name is taken, it cannot be started, or it does not
                fit to the others.
        """
        spec = parse_engine(self._config, tuple(self._specs.values()), raw, directory=self._directory)
        assert spec.name is not None, "engines have been named"
        try:
            await self._pool.add(self._build(spec))
        except EngineError as error:
            raise BadRequest(str(error)) from error
        self._specs[spec.name] = spec
        self._journal.record(EngineAdded(spec.name, engine_as_json(spec)))
        self._log.info(f"added engine {spec.name}")
        return spec.name

    async def reconfigure(self, config: Config) -> None:
        """Have the engines of a changed config; what was done to them at run time stays, where the file agrees.

        Raises:
            BadRequest: one cannot be started, or does not fit to the others; the engines are as they were.
        """
        starting = self._ledger.engine_changes.starting(engine_options(config))
        wanted = engine_specs(config, starting.engines, directory=self._directory)
        before = dict(self._specs)
        try:
            await self._become(wanted)
        except EngineError as error:
            await self._become(before)
            raise BadRequest(str(error)) from error
        record_outdated(starting, self._journal, self._log)
        for name in wanted:
            self._pool.drain(name, is_draining=name in starting.draining)
        self._config = config
        self._in_file = _by_name(config)

    async def _become(self, wanted: Mapping[str, EngineSpec]) -> None:
        """Those that stay as they are go on undisturbed."""
        for name in [name for name, spec in self._specs.items() if wanted.get(name) != spec]:
            self._pool.remove(name)
            del self._specs[name]
        for name in [name for name in wanted if name not in self._specs]:
            await self._pool.add(self._build(wanted[name]))
            self._specs[name] = wanted[name]

    def drain(self, name: str, *, is_draining: bool) -> int:
        """Send an engine no new requests, or again; returns how many it still has.

        Raises:
            BadRequest: no engine of that name.
        """
        in_flight = self._pool.drain(name, is_draining=is_draining)
        self._journal.record(EngineDrained(name, is_draining, self._in_file.get(name)))
        self._log.info(f"engine {name} {'gets no new requests' if is_draining else 'gets requests again'}")
        return in_flight

    def remove(self, name: str) -> int:
        """Let an engine go; what it was doing goes on elsewhere. Returns how many requests that were.

        Raises:
            BadRequest: no engine of that name.
        """
        in_flight = self._pool.remove(name)
        del self._specs[name]
        self._journal.record(EngineRemoved(name, self._in_file.get(name)))
        self._log.info(f"removed engine {name}; {in_flight} of its requests continue on other engines")
        return in_flight


def record_outdated(starting: StartingEngines, journal: Journal, log: FilteringBoundLogger) -> None:
    """What was done to engines at run time ends where the file has changed since; each is logged and recorded."""
    for event, sentence in starting.outdated:
        log.warning(sentence)
        journal.record(event)


def record_held(journal: Journal) -> Callable[[str, int | None, str | None], None]:
    """What the pool calls with name, version and identity of an engine whose parameters are known otherwise now."""
    return lambda engine, version, identity: journal.record(ParametersHeld(engine, version, identity))


def _by_name(config: Config) -> dict[str, dict[str, Any]]:
    return {options["name"]: options for options in engine_options(config)}
