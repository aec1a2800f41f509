"""``orchestrator check``: whether a config can be used, without contacting an engine.

Invariants:

* A config that cannot be used is a :class:`~orchestrator.errors.ConfigError` with all its problems, which the command
  line prints to standard error, one line each, with exit code 78; the report goes to standard output.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .exit_codes import OK

if TYPE_CHECKING:
    from rich.table import Table

    from orchestrator.config import Config
    from orchestrator.config.examine import Examination

__all__ = ["check", "follows_the_run", "write_out"]


def check(config: Path, /) -> int:
    """Check a config: keys, values, functions, prompt files, and the weights of the coming steps.

    No engine is contacted. Exit code 78 and one line for each problem if the config cannot be used.

    Parameters
    ----------
    config
        The YAML file.
    """
    import anyio
    from rich.console import Console
    from rich.markup import escape

    from orchestrator.config import read_config
    from orchestrator.config.examine import examine

    loaded = read_config(config)
    found = anyio.run(lambda: examine(loaded.config, directory=Path.cwd()))
    if found.findings:
        raise loaded.error(found.findings)
    console = Console(soft_wrap=True)
    with console.capture() as report:  # rich would end the process itself, with 1, on a closed pipe
        console.print(_sources(loaded.config, found))
        if found.adaptive:
            console.print(follows_the_run(found.adaptive))
        for engine in loaded.config.engines:
            console.print(f"engine {escape(str(engine.name))} ({engine.kind})")
        for warning in found.warnings:
            console.print(f"[yellow]warning:[/] {escape(warning)}")
        console.print("[green]OK[/]")
    write_out(report.get())
    return OK


def follows_the_run(adaptive: Sequence[str]) -> str:
    """What to know of weights that no table can foretell."""
    return f"adaptive, shown as they are before anything is seen; a run moves them: {', '.join(adaptive)}"


def write_out(text: str) -> None:
    """Write to standard output; a reader that has closed the pipe, as `| head` does, is no failure."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more at exit, and would end with 120: there must be something that takes what is left.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _sources(config: Config, found: Examination) -> Table:
    from rich.markup import escape
    from rich.table import Table

    first, last = found.plan[0], found.plan[-1]
    table = Table(
        title=f"{config.run.name}: batches of {config.rollout.rollout_batch_size} groups", title_justify="left"
    )
    for heading in ("source", "prompts", f"weight at step {first.step}", f"weight at step {last.step}", "reward"):
        table.add_column(heading, justify="left" if heading in ("source", "reward") else "right")
    for source in config.data_sources:
        table.add_row(
            source.name,
            f"{found.prompts[source.name]:,}",
            f"{first.shares[source.name]:.3f}",
            f"{last.shares[source.name]:.3f}",
            escape(source.reward.name),
        )
    return table
