"""``orchestrator status``: the state of a running daemon, at a glance or as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from .live import CONNECT_TIMEOUT_S, Socket

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["duration", "engine_table", "render", "status"]


def status(
    *,
    socket: Socket = None,
    as_json: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> None:
    """Show the state of a running daemon.

    Parameters
    ----------
    socket
        The daemon's socket.
    as_json
        Print everything as one JSON object.
    """
    from orchestrator.client import RolloutClient

    with RolloutClient(socket, connect_timeout_s=CONNECT_TIMEOUT_S, client="orchestrator status") as client:
        report = client.status()
    if as_json:
        import json

        print(json.dumps(report, indent=2, ensure_ascii=False))
        return
    from rich.console import Console

    Console(highlight=False).print(render(report))


def render(report: dict[str, Any]) -> RenderableType:
    """The status, for a terminal of at least 80 columns."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [_headline(report), _sources(report), engine_table(report["engines"])]
    leases = report["leases"]
    if leases:
        held = ", ".join(
            f"step {lease['step']}" + (f" rank {lease['rank']}" if lease["world_size"] > 1 else "") for lease in leases
        )
        parts.append(Text(f"Not acknowledged: {held}"))
    said = report["headline"]
    parts.append(Text(said["text"], style={"late": "bold red", "waiting": "yellow"}.get(said["level"], "")))
    if report["state"]["fault"]:
        parts.append(Text(f"Disk: {report['state']['fault']}", style="bold red"))
    if report["archive"] and report["archive"]["fault"]:
        parts.append(Text(f"Archive: {report['archive']['fault']}", style="bold red"))
    failing = [sink for sink in report["sinks"] if sink["fault"]]
    parts.extend(Text(f"Metrics to {sink['name']}: {sink['fault']}", style="yellow") for sink in failing)
    parts.extend(Text(f"Damage found at startup: {problem}", style="red") for problem in report["problems"])
    return Group(*parts)


def _headline(report: dict[str, Any]) -> RenderableType:
    from rich.text import Text

    run = report["run"]
    end = f" of {run['num_rollout']}" if run["num_rollout"] else ""
    state = "finished" if report["is_finished"] else "running"
    if report["generation"]["draining"]:
        state = "drained"
    elif report["generation"]["paused"]:
        state = "generation paused"
    line = Text(run["name"], style="bold")
    line.append(
        f"  step {report['step']}{end} · policy version {report['policy_version']} · {state}"
        f" · up {duration(run['uptime_s'])} · pid {run['pid']}",
        style="not bold",
    )
    return line


def duration(seconds: float) -> str:
    """Such as ``12 s``, ``3 min 5 s``, ``26 h 4 min``."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _sources(report: dict[str, Any]) -> RenderableType:
    """A table of figures, and below it remarks that do not fit into the table."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("source", style="bold", no_wrap=True)
    for column in ("weight", "next batch", "buffered", "in flight", "handed out", "dropped"):
        table.add_column(column, justify="right")
    plan = report["plan"][0] if report["plan"] else None
    remarks: list[tuple[str, str]] = []
    for name, source in report["sources"].items():
        groups = source["groups"]
        table.add_row(
            name,
            f"{100 * plan['weights'][name]:.1f}%" if plan else "–",
            str(plan["counts"][name]) if plan else "–",
            f"{groups['buffered']} / {source['wanted']}",
            str(groups["in_flight"]),
            str(source["handed_out"]),
            str(groups["dropped"]),
        )
        remarks.append((name, _remarks(source)))
    return _with_remarks(table, remarks)


def _remarks(source: dict[str, Any]) -> str:
    remarks = [word for word in ("paused", "exhausted") if source[word]]
    if source["debt"]:
        remarks.append(f"{abs(source['debt']):.3g} groups {'owed' if source['debt'] > 0 else 'ahead'}")
    if source["weight"]["set_at_run_time"]:
        remarks.append(f"weight set: {source['weight']['text']}")
    remarks.extend(f"{count['groups']} {reason}" for reason, count in source["dropped"].items())
    return ", ".join(remarks)


def _with_remarks(table: RenderableType, remarks: Sequence[tuple[str, str]]) -> RenderableType:
    """The table, and below it a line for each name that has a remark.

    Remarks quote servers and functions of the user: they are not markup, and control characters are removed.
    """
    from rich.console import Group
    from rich.text import Text

    lines = [
        Text.assemble((name, "bold"), ": ", "".join(c if c.isprintable() else " " for c in text))
        for name, text in remarks
        if text
    ]
    return Group(table, *lines, *([Text("")] if lines else []))


def engine_table(engines: Sequence[dict[str, Any]]) -> RenderableType:
    """The engines as ``status`` reports them; ``late`` and ``failed`` are requests that moved to other engines.

    The last failure of each is below the table, because it does not fit into 80 columns.
    """
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("engine", style="bold", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for column in ("in flight", "done", "failed", "late", "tokens"):
        table.add_column(column, justify="right")
    has_versions = any(engine["policy_version"] is not None for engine in engines)
    if has_versions:
        table.add_column("version", justify="right")
    errors: list[tuple[str, str]] = []
    for engine in engines:
        version = engine["policy_version"]
        table.add_row(
            engine["name"],
            f"[{_COLOURS.get(engine['state'], 'red')}]{engine['state']}[/]",
            f"{engine['in_flight']} / {engine['max_in_flight']}",
            str(engine["completed"]),
            str(engine["failed"]),
            str(engine["late"]),
            f"{engine['tokens']:,}" if engine["tokens"] < 10**8 else f"{engine['tokens'] / 10**6:,.0f} M",
            *(["–" if version is None else str(version)] if has_versions else []),
        )
        said = (engine["last_error"] or "").removeprefix(f"engine {engine['name']}: ")
        errors.append((engine["name"], f"last error: {said}" if said else ""))
    return _with_remarks(table, errors)


_COLOURS = {"up": "green", "trial": "yellow", "updating": "yellow", "draining": "yellow"}
