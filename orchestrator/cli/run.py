"""``orchestrator run``: the daemon."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

__all__ = ["run"]

DESCRIPTORS = 1 << 17
"""Enough for the most connections that a config may allow (65,536), and as many requests to engines."""


def run(config: Path, /, *, allow_source_changes: Annotated[bool, Parameter(negative=())] = False) -> None:
    """Run the daemon until it is stopped or the run is finished.

    SIGTERM and SIGINT stop it cleanly: what is in flight is saved, and the
    next start continues from there. A second signal stops it at once. SIGHUP
    reloads the config. SIGUSR1 reopens the log file.

    Parameters
    ----------
    config
        The config file (YAML).
    allow_source_changes
        Resume a run whose sources have changed. Buffered groups of removed sources are lost.
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
    """Raise this process's limit of open files as far as allowed; shells and systemd start with 1,024."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    """The errors in a group and in its nested groups."""
    found: list[BaseException] = []
    for error in group.exceptions:
        found.extend(leaves(error) if isinstance(error, BaseExceptionGroup) else [error])
    return found
