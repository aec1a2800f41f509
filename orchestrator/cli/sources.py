"""``orchestrator sources``: show, add, remove and restore sources of a running daemon."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cyclopts import App

from .live import CONNECT_TIMEOUT_S, Socket, as_weight
from .yaml_text import mapping_of

if TYPE_CHECKING:
    from orchestrator.client import RolloutClient

__all__ = ["sources"]

EXAMPLE = "orchestrator sources add '{name: code, prompts: {path: data/code.jsonl}, reward: exact_match}' 0.2"

sources = App(
    name="sources",
    help="Show, add, remove and restore sources of a running daemon. Changes survive restarts.",
    help_format="plaintext",
    help_epilogue=f"Example: {EXAMPLE}",
)


def _client(socket: Socket) -> RolloutClient:
    from orchestrator.client import RolloutClient

    return RolloutClient(socket, connect_timeout_s=CONNECT_TIMEOUT_S, client="orchestrator sources")


@sources.default
def show(*, socket: Socket = None) -> None:
    """Show the sources of a running daemon.

    Parameters
    ----------
    socket
        The daemon's socket.
    """
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("source", style="bold", no_wrap=True)
    for heading in ("weight", "cap", "state", "prompts"):
        table.add_column(heading, overflow="fold")
    with _client(socket) as client:
        for entry in client.sources():
            source, cap = entry["source"], entry.get("cap")
            state = {"in_file": "config file", "added": "added at run time", "removed": "removed at run time"}
            table.add_row(
                source["name"],
                escape(str(entry.get("weight", ""))),
                "" if cap is None else escape(str(cap)),
                state.get(entry["state"], entry["state"]),
                escape(source["prompts"]["path"]),
            )
    Console(highlight=False).print(table)


@sources.command(help_epilogue=f"Example: {EXAMPLE}")
def add(source: str, weight: str, /, *, cap: str | None = None, socket: Socket = None) -> None:
    """Add a source.

    Parameters
    ----------
    source
        The source, written as in the config file. Relative paths are relative to the daemon's working directory.
    weight
        A number, a "lambda step: ..." expression, or the dotted path of a function.
    cap
        Reward cap, in the same forms. Groups with a higher mean reward are dropped.
    socket
        The daemon's socket.
    """
    options = mapping_of(source, "a source", "{name: NAME, prompts: {path: FILE}}")
    with _client(socket) as client:
        client.add_source(options, as_weight(weight), None if cap is None else as_weight(cap))
    print(f"added {options.get('name')} with weight {weight}")


@sources.command(help_epilogue="Example: orchestrator sources remove code")
def remove(name: str, /, *, socket: Socket = None) -> None:
    """Remove a source. Its groups in flight and in the buffer are dropped and counted.

    Parameters
    ----------
    name
        Name of the source.
    socket
        The daemon's socket.
    """
    with _client(socket) as client:
        client.remove_source(name)
    print(f"removed {name}")


@sources.command(help_epilogue="Example: orchestrator sources restore code")
def restore(name: str, /, *, socket: Socket = None) -> None:
    """Restore a removed source of the config file. It continues where it stopped.

    Parameters
    ----------
    name
        Name of the source.
    socket
        The daemon's socket.
    """
    with _client(socket) as client:
        client.restore_source(name)
    print(f"restored {name}")
