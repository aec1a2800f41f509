"""``orchestrator weights``: the curriculum of a config, step by step, or the weights in force in a daemon.

Invariants:

* Counts are those of a run from step 0 on: ``--start`` hides rows and does not change any.
* A reader that closes the pipe ends the command quietly.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from .check import adaptive_note, write_out
from .exit_codes import OK, USAGE
from .live import CONNECT_TIMEOUT_S, Socket

if TYPE_CHECKING:
    from rich.table import Table

    from orchestrator.core.mixture.plan import PlannedBatch

__all__ = ["weights"]

MAX_STEPS = 100_000
"""The most steps, and the highest first step, that can be asked for; evaluating them takes a few seconds."""


def weights(
    config: Path | None = None,
    /,
    *,
    steps: Annotated[int | None, Parameter(validator=Number(gte=1, lte=MAX_STEPS))] = None,
    start: Annotated[int, Parameter(validator=Number(gte=0, lte=MAX_STEPS))] = 0,
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
    plot: Path | None = None,
    socket: Socket = None,
) -> int:
    """Show each source's share and group count, step by step. Without a config, show the weights in force.

    Parameters
    ----------
    config
        The config file (YAML). Without it, a running daemon reports its weights and the reasons for them.
    steps
        Number of steps (required with a config).
    start
        First step to show.
    as_json
        Print one JSON object a line instead of a table.
    plot
        Plot the shares to this PNG file. Needs matplotlib (the extra `plot`).
    socket
        The daemon's socket.
    """
    if config is None:
        return _in_force(socket, as_json=as_json)
    if steps is None:
        print("orchestrator weights CONFIG needs --steps N", file=sys.stderr)
        return USAGE
    names, batches, adaptive = _batches(config, start, steps)
    if plot is not None:
        from .plot import draw_weights

        draw_weights(batches, names, plot, title=f"{config.stem}: share of each batch by source")
    if as_json:
        write_out(_json_lines(batches))
    elif plot is None:
        write_out(_table(batches, names))
    else:
        write_out(f"wrote {plot}\n")
    if adaptive and not as_json:
        write_out(adaptive_note(adaptive) + "\n")
    return OK


def _batches(config: Path, start: int, steps: int) -> tuple[Sequence[str], Sequence[PlannedBatch], Sequence[str]]:
    """The sources, the planned batches from ``start`` on, and the sources whose weights are adaptive.

    Raises:
        ConfigError: the config cannot be used, or its weights at some step.
    """
    from orchestrator.config import read_config
    from orchestrator.config.examine import find_broken_weights, load_weights, plan_from_start

    loaded = read_config(config)
    table, findings = load_weights(loaded.config, directory=Path.cwd())
    if table is None:
        raise loaded.error(findings)
    if broken := find_broken_weights(table, start + steps):
        raise loaded.error(broken)
    return loaded.config.source_names, plan_from_start(loaded.config, table, start + steps)[start:], table.adaptive


def _in_force(socket: Path | None, *, as_json: bool) -> int:
    """Print the weights in force in a running daemon, and why."""
    from orchestrator.client import RolloutClient

    with RolloutClient(socket, connect_timeout_s=CONNECT_TIMEOUT_S, client="orchestrator weights") as client:
        status = client.status()
    if as_json:
        import orjson

        lines = [{"source": name, **source["weight"]} for name, source in status["sources"].items()]
        write_out("".join(orjson.dumps(line).decode() + "\n" for line in lines))
        return OK
    from rich.table import Table

    table = Table(title=f"weights from step {status['step']} on", title_justify="left")
    for column in ("source", "share", "weight", "written as", "why"):
        table.add_column(column, justify="right" if column in ("share", "weight") else "left")
    for name, source in status["sources"].items():
        weight = source["weight"]
        figures = ["–" if weight[key] is None else f"{weight[key]:.3f}" for key in ("share", "value")]
        table.add_row(name, *figures, weight["text"], weight["why"])
    write_out(_rendered(table))
    return OK


def _json_lines(batches: Sequence[PlannedBatch]) -> str:
    import orjson

    lines = [{"step": batch.step, "weights": batch.shares, "counts": batch.counts} for batch in batches]
    return "".join(orjson.dumps(line).decode() + "\n" for line in lines)


def _table(batches: Sequence[PlannedBatch], names: Sequence[str]) -> str:
    from rich.table import Table

    table = Table()
    table.add_column("step", justify="right")
    for name in names:
        table.add_column(name, justify="right")
        table.add_column("groups", justify="right", style="dim")
    for batch in batches:
        cells = [(f"{batch.shares[name]:.3f}", str(batch.counts[name])) for name in names]
        table.add_row(str(batch.step), *(cell for pair in cells for cell in pair))
    return _rendered(table)


def _rendered(table: Table) -> str:
    from rich.console import Console

    console = Console()
    with console.capture() as capture:  # rich would end the process itself on a closed pipe
        console.print(table)
    return capture.get()
