"""``orchestrator sources``: the sources of a running daemon; add, remove, restore one."""

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
    help="Show the sources of a running daemon; add, remove, restore one. What is done is kept across restarts.",
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
        As the config file says it; relative paths are relative to the daemon's working directory.
    weight
        A number, a "lambda step: ...", or a dotted path.
    cap
        Mean reward above which its groups are dropped, in the same forms.
    socket
        The daemon's socket.
    """
    options = mapping_of(source, "a source", "{name: NAME, prompts: {path: FILE}}")
    with _client(socket) as client:
        client.add_source(options, as_weight(weight), None if cap is None else as_weight(cap))
    print(f"{options.get('name')} was added with weight {weight}")


@sources.command(help_epilogue="Example: orchestrator sources remove code")
def remove(name: str, /, *, socket: Socket = None) -> None:
    """Let a source go. What of it is in flight and buffered is dropped and counted.

    Parameters
    ----------
    name
        Name of the source.
    socket
        The daemon's socket.
    """
    with _client(socket) as client:
        client.remove_source(name)
    print(f"{name} was removed")


@sources.command(help_epilogue="Example: orchestrator sources restore code")
def restore(name: str, /, *, socket: Socket = None) -> None:
    """Have a source of the config file again that was removed. It goes on where it was.

    Parameters
    ----------
    name
        Name of the source.
    socket
        The daemon's socket.
    """
    with _client(socket) as client:
        client.restore_source(name)
    print(f"{name} takes part again")
