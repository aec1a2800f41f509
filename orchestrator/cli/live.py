"""Commands that change a running daemon: ``set-weight``, ``pause``, ``resume``, ``reload``, ``drain``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

__all__ = ["CONNECT_TIMEOUT_S", "Socket", "as_weight", "described", "drain", "pause", "reload", "resume", "set_weight"]

CONNECT_TIMEOUT_S = 1.0
"""Short, because somebody is waiting: a daemon that does not run is reported at once."""

Socket = Annotated[
    Path | None,
    Parameter(help="The daemon's socket (default: $ORCHESTRATOR_SOCKET, then run/orchestrator.sock)."),
]


def set_weight(source: str, weight: str, /, *, socket: Socket = None) -> None:
    """Set a source's weight from the next batch on. It survives restarts.

    Parameters
    ----------
    source
        Name of the source.
    weight
        A number, a "lambda step: ..." expression, a dotted path, or "file" to return to the config file.
    socket
        The daemon's socket.
    """
    from orchestrator.client import RolloutClient

    value = None if weight == "file" else as_weight(weight)
    with RolloutClient(socket, connect_timeout_s=CONNECT_TIMEOUT_S, client="orchestrator set-weight") as client:
        step = client.set_weight(source, value)["step"]
    what = "back to the config file's weight" if value is None else f"weight {weight}"
    print(f"{source}: {what} from step {step} on")


def as_weight(text: str) -> float | str:
    """A weight as in the config: a number, or the text itself."""
    try:
        return float(text)
    except ValueError:
        return text


def pause(source: str, /, *, socket: Socket = None) -> None:
    """Pause a source: new batches take no groups from it. It stays paused across restarts.

    Parameters
    ----------
    source
        Name of the source.
    socket
        The daemon's socket.
    """
    from orchestrator.client import RolloutClient

    with RolloutClient(socket, connect_timeout_s=CONNECT_TIMEOUT_S, client="orchestrator pause") as client:
        client.pause(source)
    print(f"paused {source}")


def resume(source: str, /, *, socket: Socket = None) -> None:
    """Resume a paused source.

    Parameters
    ----------
    source
        Name of the source.
    socket
        The daemon's socket.
    """
    from orchestrator.client import RolloutClient

    with RolloutClient(socket, connect_timeout_s=CONNECT_TIMEOUT_S, client="orchestrator resume") as client:
        client.resume(source)
    print(f"resumed {source}")


def reload(*, socket: Socket = None) -> None:
    """Reload the daemon's config file. It is checked in full first; on any error nothing changes.

    Weights, caps, buffers, filters, sampling, rewards, engines and sources
    change at once. Changes that need a restart are marked as such.

    Parameters
    ----------
    socket
        The daemon's socket.
    """
    from orchestrator.client import RolloutClient

    with RolloutClient(socket, connect_timeout_s=CONNECT_TIMEOUT_S, client="orchestrator reload") as client:
        answer = client.reload()
    for line in described(answer["changes"]):
        print(line)
    print(f"the config is in force from step {answer['step']} on" if answer["changes"] else "nothing changed")


def described(changes: Sequence[Mapping[str, Any]]) -> list[str]:
    """The changes, one a line, with values as in a config. A source or engine that was added or removed is one line."""
    import json

    whole: dict[str, str] = {}
    for change in changes:
        section, verb, name = change["key"].partition(".")[0], "added", change["new"]
        if name is None:
            verb, name = "removed", change["old"]
        if section in ("data_sources", "engines") and change["key"] == f"{section}.{name}.name":
            whole[f"{section}.{name}"] = verb
    lines = []
    for change in changes:
        of = next((key for key in whole if change["key"].startswith(f"{key}.")), None)
        if of is None:
            old, new = (json.dumps(change[side], ensure_ascii=False) for side in ("old", "new"))
            lines.append(f"{change['key']}: {old} -> {new}{'' if change['is_live'] else ' (after a restart)'}")
        elif (line := f"{of}: {whole[of]}") not in lines:
            lines.append(line)
    return lines


def drain(*, socket: Socket = None) -> None:
    """Stop launching, save what is in flight, and write a snapshot. Finished groups are still handed out.

    Parameters
    ----------
    socket
        The daemon's socket.
    """
    from orchestrator.client import RolloutClient

    with RolloutClient(socket, connect_timeout_s=CONNECT_TIMEOUT_S, client="orchestrator drain") as client:
        client.drain()
    print("drained: everything in flight is saved; stop the daemon with SIGTERM when you like")
