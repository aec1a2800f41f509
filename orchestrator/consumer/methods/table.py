"""What all files of methods share: the shape of a table of methods, and who asked.

Invariants:

* A method is called only with parameters that its type has checked.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from orchestrator.consumer.socket.connection import Answer, Connection

__all__ = ["Method", "Methods", "who"]

Method = tuple[type[Any], Callable[[Connection, Any], Awaitable[Answer]]]
"""The type of a method's parameters, and the function that answers it."""


class Methods(Protocol):
    """The methods of one subject."""

    def methods(self) -> dict[str, Method]:
        """The parameters and the function of each method, by its name on the wire."""
        ...


def who(connection: Connection) -> str:
    """The client of a connection, as log lines name it."""
    return f"{connection.client or 'a client'} (pid {connection.holder.pid})"
