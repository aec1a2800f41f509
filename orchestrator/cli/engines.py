"""``orchestrator engines``: show, add, drain, resume and remove engines of a running daemon."""

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
    help="Show, add, drain, resume and remove engines of a running daemon. Changes survive restarts.",
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
        The engine, written as in the config file. Relative paths are relative to the daemon's working directory.
    socket
        The daemon's socket.
    """
    options = mapping_of(engine, "an engine", '{kind: sglang, url: "http://HOST:PORT"}')
    with _client(socket) as client:
        name = client.add_engine(options)
        state = next(entry for entry in client.engines() if entry["name"] == name)
    why = f" ({state['last_error']})" if state["state"] == "down" and state["last_error"] else ""
    if state["state"] == "outdated":
        why = ": it gets no requests until it is known to hold the current policy version (see update_weights)"
    print(f"added {name}; it is {state['state']}{why}")


@engines.command(help_epilogue="Example: orchestrator engines drain 127.0.0.1:30001")
def drain(name: str, /, *, socket: Socket = None) -> None:
    """Stop sending new requests to an engine. Requests in flight run to completion.

    Parameters
    ----------
    name
        Name of the engine.
    socket
        The daemon's socket.
    """
    with _client(socket) as client:
        in_flight = client.drain_engine(name)
    print(f"{name} gets no new requests; {in_flight} still in flight")


@engines.command(help_epilogue="Example: orchestrator engines resume 127.0.0.1:30001")
def resume(name: str, /, *, socket: Socket = None) -> None:
    """Send requests to a drained engine again.

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
    """Remove an engine. Its requests continue on other engines, with their tokens kept.

    Parameters
    ----------
    name
        Name of the engine.
    socket
        The daemon's socket.
    """
    with _client(socket) as client:
        in_flight = client.remove_engine(name)
    print(f"removed {name}; {in_flight} requests continue on other engines")
