"""Commands that change a running daemon: ``set-weight``, ``pause``, ``resume``, ``reload``, ``drain``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

__all__ = ["CONNECT_TIMEOUT_S", "Socket", "as_weight", "described", "drain", "pause", "reload", "resume", "set_weight"]

CONNECT_TIMEOUT_S = 1.0
"""A person asks about a daemon that runs; one that does not is said at once."""

Socket = Annotated[
    Path | None,
    Parameter(help="The daemon's socket; without it $ORCHESTRATOR_SOCKET, then run/orchestrator.sock."),
]


def set_weight(source: str, weight: str, /, *, socket: Socket = None) -> None:
    """Set a source's weight at run time, from the next batch on; it is kept across restarts.

    Parameters
    ----------
    source
        Name of the source.
    weight
        A number, a "lambda step: ...", a dotted path, or "file" for back to the config file.
    socket
        The daemon's socket.
    """
    from orchestrator.client import RolloutClient

    value = None if weight == "file" else as_weight(weight)
    with RolloutClient(socket, connect_timeout_s=CONNECT_TIMEOUT_S, client="orchestrator set-weight") as client:
        step = client.set_weight(source, value)["step"]
    print(f"{source}: {'the weight of the config file' if value is None else f'weight {weight}'} from step {step} on")


def as_weight(text: str) -> float | str:
    """A weight as the config has it: a number, or the text."""
    try:
        return float(text)
    except ValueError:
        return text


def pause(source: str, /, *, socket: Socket = None) -> None:
    """Let a source take no part in new batches; it is kept across restarts.

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
    print(f"{source} is paused")


def resume(source: str, /, *, socket: Socket = None) -> None:
    """Let a paused source take part again.

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
    print(f"{source} takes part again")


def reload(*, socket: Socket = None) -> None:
    """Have the daemon read its config file again. It is checked wholly first; on any error all stays as it was.

    Weights, caps, buffers, filters, sampling, rewards, engines and sources
    change at once; what a daemon reads only when it starts is listed.

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
    print(f"the config is in force from step {answer['step']} on" if answer["changes"] else "nothing has changed")


def described(changes: Sequence[Mapping[str, Any]]) -> list[str]:
    """What has changed, a line each, values as a config has them; a source or engine that comes or goes is one line."""
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
            lines.append(f"{change['key']}: {old} -> {new}{'' if change['is_live'] else ' (at the next start)'}")
        elif (line := f"{of}: {whole[of]}") not in lines:
            lines.append(line)
    return lines


def drain(*, socket: Socket = None) -> None:
    """Stop launching, park what is in flight, and write a snapshot; the daemon stays up and hands out what it has.

    Parameters
    ----------
    socket
        The daemon's socket.
    """
    from orchestrator.client import RolloutClient

    with RolloutClient(socket, connect_timeout_s=CONNECT_TIMEOUT_S, client="orchestrator drain") as client:
        client.drain()
    print("drained: everything in flight is parked; stop the daemon with SIGTERM when you like")
