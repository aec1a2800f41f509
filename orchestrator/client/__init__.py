"""The trainer's library: batches from the daemon's Unix socket as numpy arrays (protocol: ``docs/protocol.md``).

    from orchestrator.client import RolloutClient

    with RolloutClient() as client:
        for batch in client.batches():
            train(batch.padded(), batch.advantages())

Invariants:

* Needs the standard library and numpy, and nothing of the daemon. ``AsyncRolloutClient`` alone needs anyio, and is
  loaded when it is first named.
* Errors are the types of ``orchestrator.errors``.

From the ground up, as ``.importlinter`` holds it: ``buffers`` (memory that is used again), ``waiting`` (blocking or
not), ``remote_errors``; ``files`` and ``stream`` (what a socket brings); ``wire`` (one connection); ``checks``,
``groups``, ``padding``, ``batch`` (what is received); ``loop`` (over batches); ``connecting``, ``engine_calls``,
``config_calls``, ``core`` (the methods); ``blocking`` and ``asynchronous`` (the two forms for users).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .batch import Batch
from .blocking import RolloutClient
from .groups import RolloutGroup, RolloutSample
from .wire import BatchRequest

if TYPE_CHECKING:
    from .asynchronous import AsyncRolloutClient

__all__ = ["AsyncRolloutClient", "Batch", "BatchRequest", "RolloutClient", "RolloutGroup", "RolloutSample"]


def __getattr__(name: str) -> Any:
    if name == "AsyncRolloutClient":
        from .asynchronous import AsyncRolloutClient

        return AsyncRolloutClient
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
