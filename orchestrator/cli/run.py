"""``orchestrator run``: the daemon."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

__all__ = ["run"]

DESCRIPTORS = 1 << 17
"""For the most connections that may be configured (65,536), and as many requests to engines."""


def run(config: Path, /, *, allow_source_changes: Annotated[bool, Parameter(negative=())] = False) -> None:
    """Run the daemon until it is stopped, or until the run is finished.

    SIGTERM and SIGINT stop it cleanly: what is in flight is parked, and the
    next start goes on from there; a second signal ends it at once. SIGHUP reads
    the config again, SIGUSR1 opens the log file again.

    Parameters
    ----------
    config
        The YAML file.
    allow_source_changes
        Go on with the state of a run whose sources were others: those that are gone lose what is buffered.
    """
    from orchestrator.concurrency.main_loop import run_main
    from orchestrator.config import load_config
    from orchestrator.daemon.daemon import Daemon
    from orchestrator.errors import OrchestratorError
    from orchestrator.logs import configure_logging

    file = config.absolute()
    settings = load_config(file)
    logs = configure_logging(file=settings.logging.file, level=settings.logging.level, run=settings.run.name)

    async def main() -> None:
        await Daemon(settings, logs, file=file, allow_source_changes=allow_source_changes).run()

    def left_behind(tasks: list[str]) -> None:
        logs.logger("daemon").warning(f"left behind, because they ignored cancellation: {', '.join(tasks)}")

    _allow_descriptors()
    try:
        run_main(main, left_behind)
    except BaseExceptionGroup as group:
        known = [error for error in leaves(group) if isinstance(error, OrchestratorError)]
        if len(known) == len(leaves(group)):
            raise known[0] from group
        raise
    finally:
        logs.close()


def _allow_descriptors() -> None:
    """Let this process have as many descriptors as it may; shells and systemd give 1,024 to begin with."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    """The errors in a group and in the groups within it."""
    found: list[BaseException] = []
    for error in group.exceptions:
        found.extend(leaves(error) if isinstance(error, BaseExceptionGroup) else [error])
    return found
