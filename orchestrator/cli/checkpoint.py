"""``orchestrator checkpoint``: named checkpoints of a running daemon."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from .live import CONNECT_TIMEOUT_S, Socket

if TYPE_CHECKING:
    from orchestrator.client import RolloutClient

__all__ = ["checkpoint"]

checkpoint = App(
    name="checkpoint",
    help="Save, load, list and verify named checkpoints of a running daemon.",
    help_format="plaintext",
    help_epilogue="Example: orchestrator checkpoint save step-100",
)


def _client(socket: Socket) -> RolloutClient:
    from orchestrator.client import RolloutClient

    return RolloutClient(socket, connect_timeout_s=CONNECT_TIMEOUT_S, client="orchestrator checkpoint")


@checkpoint.command(help_epilogue="Example: orchestrator checkpoint save step-100 --trained-through 99")
def save(name: str, /, *, trained_through: int | None = None, socket: Socket = None) -> None:
    """Save a checkpoint of the current state. Buffered groups are not copied.

    Parameters
    ----------
    name
        Name of the checkpoint. An existing one of this name is replaced.
    trained_through
        Count batches up to this step as acknowledged. Without it, only those that were acknowledged.
    socket
        The daemon's socket.
    """
    with _client(socket) as client:
        step = client.save(name, trained_through)["step"]
    print(f"saved checkpoint {name} at step {step}")


@checkpoint.command(help_epilogue="Example: orchestrator checkpoint load step-100")
def load(name: str, /, *, socket: Socket = None) -> None:
    """Go back to a checkpoint. All leases expire. Nothing is generated until a policy version is set.

    Parameters
    ----------
    name
        Name of the checkpoint.
    socket
        The daemon's socket.
    """
    with _client(socket) as client:
        step = client.load(name)["step"]
    print(f"loaded checkpoint {name} at step {step}; set a policy version to continue (set_policy_version)")


@checkpoint.command(name="list", help_epilogue="Example: orchestrator checkpoint list")
def show(*, socket: Socket = None) -> None:
    """List the checkpoints, oldest first.

    Parameters
    ----------
    socket
        The daemon's socket.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    with _client(socket) as client:
        checkpoints = client.checkpoints()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("checkpoint", style="bold", no_wrap=True)
    for column in ("step", "version", "groups", "log on disk"):
        table.add_column(column, justify="right")
    table.add_column("saved")
    for entry in checkpoints:
        table.add_row(
            entry["name"],
            *("–" if entry[key] is None else str(entry[key]) for key in ("step", "policy_version", "groups")),
            f"{entry['size_bytes'] / 2**20:.1f} MiB",
            entry["damage"] or f"{datetime.fromtimestamp(entry['saved_at']).astimezone():%Y-%m-%d %H:%M:%S}",
        )
    Console(highlight=False).print(table if checkpoints else "there are no checkpoints")


@checkpoint.command(help_epilogue="Example: orchestrator checkpoint verify")
def verify(
    name: Annotated[str | None, Parameter(help="Name of the checkpoint (default: all of them).")] = None,
    /,
    *,
    socket: Socket = None,
) -> int:
    """Verify every checksum. The exit code is 1 if anything is damaged.

    Parameters
    ----------
    socket
        The daemon's socket.
    """
    with _client(socket) as client:
        problems = client.verify_checkpoints(name)
    for checked, found in problems.items():
        print(f"{checked}: {'; '.join(found) if found else 'OK'}")
    return int(any(problems.values()))
