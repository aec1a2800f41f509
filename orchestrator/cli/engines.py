"""``orchestrator engines``: the engines of a running daemon, and which of them it uses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cyclopts import App

from .live import CONNECT_TIMEOUT_S, Socket
from .status import engine_table
from .yaml_text import mapping_of

if TYPE_CHECKING:
    from orchestrator.client import RolloutClient

__all__ = ["engines"]

engines = App(
    name="engines",
    help="Show the engines of a running daemon; add, drain, resume, remove one. What is done is kept across restarts.",
    help_format="plaintext",
    help_epilogue="""Example: orchestrator engines add '{kind: sglang, url: "http://127.0.0.1:30001"}'""",
)


def _client(socket: Socket) -> RolloutClient:
    from orchestrator.client import RolloutClient

    return RolloutClient(socket, connect_timeout_s=CONNECT_TIMEOUT_S, client="orchestrator engines")


@engines.default
def show(*, socket: Socket = None) -> None:
    """Show the engines of a running daemon.

    Parameters
    ----------
    socket
        The daemon's socket.
    """
    from rich.console import Console

    with _client(socket) as client:
        Console(highlight=False).print(engine_table(client.engines()))


@engines.command(help_epilogue="""Example: orchestrator engines add '{kind: sglang, url: "http://127.0.0.1:30001"}'""")
def add(engine: str, /, *, socket: Socket = None) -> None:
    """Add an engine.

    Parameters
    ----------
    engine
        As the config file says it; relative paths are relative to the daemon's working directory.
    socket
        The daemon's socket.
    """
    options = mapping_of(engine, "an engine", '{kind: sglang, url: "http://HOST:PORT"}')
    with _client(socket) as client:
        name = client.add_engine(options)
        state = next(entry for entry in client.engines() if entry["name"] == name)
    why = f" ({state['last_error']})" if state["state"] == "down" and state["last_error"] else ""
    if state["state"] == "outdated":
        why = ": it gets no work until it is known to hold the policy version in force (update_weights)"
    print(f"{name} was added; it is {state['state']}{why}")


@engines.command(help_epilogue="Example: orchestrator engines drain 127.0.0.1:30001")
def drain(name: str, /, *, socket: Socket = None) -> None:
    """Send an engine no new requests; those that it has run to their end.

    Parameters
    ----------
    name
        Name of the engine.
    socket
        The daemon's socket.
    """
    with _client(socket) as client:
        in_flight = client.drain_engine(name)
    print(f"{name} gets no new requests; it still has {in_flight}")


@engines.command(help_epilogue="Example: orchestrator engines resume 127.0.0.1:30001")
def resume(name: str, /, *, socket: Socket = None) -> None:
    """Send a drained engine requests again.

    Parameters
    ----------
    name
        Name of the engine.
    socket
        The daemon's socket.
    """
    with _client(socket) as client:
        client.resume_engine(name)
    print(f"{name} gets requests again")


@engines.command(help_epilogue="Example: orchestrator engines remove 127.0.0.1:30001")
def remove(name: str, /, *, socket: Socket = None) -> None:
    """Let an engine go; what it was doing goes on elsewhere, with its tokens kept.

    Parameters
    ----------
    name
        Name of the engine.
    socket
        The daemon's socket.
    """
    with _client(socket) as client:
        in_flight = client.remove_engine(name)
    print(f"{name} was removed; {in_flight} requests go on elsewhere")
