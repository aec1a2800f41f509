"""``orchestrator check``: check a config without contacting an engine.

Invariants:

* A config that cannot be used raises a :class:`~orchestrator.errors.ConfigError` with all its problems. The command
  line prints them to standard error, one a line, with exit code 78. The report goes to standard output.
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

__all__ = ["adaptive_note", "check", "write_out"]


def check(config: Path, /) -> int:
    """Check a config: keys, values, functions, prompt files, and the weights of the coming steps.

    No engine is contacted. If the config cannot be used, each problem is
    printed on one line and the exit code is 78.

    Parameters
    ----------
    config
        The config file (YAML).
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
            console.print(adaptive_note(found.adaptive))
        for engine in loaded.config.engines:
            console.print(f"engine {escape(str(engine.name))} ({engine.kind})")
        for warning in found.warnings:
            console.print(f"[yellow]warning:[/] {escape(warning)}")
        console.print("[green]OK[/]")
    write_out(report.get())
    return OK


def adaptive_note(adaptive: Sequence[str]) -> str:
    """A note on weights that depend on the run, which no table can show in advance."""
    return f"adaptive weights are shown at their starting values; they change during a run: {', '.join(adaptive)}"


def write_out(text: str) -> None:
    """Write to standard output. A reader that has closed the pipe, as `| head` does, is not an error."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more at exit and would exit with 120, so something has to accept the rest.
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
