"""How the stages change the durable facts: by records, and by nothing else.

Invariants:

* A record is applied to the ledger when it is made, and written in the order in which it was made.
* What must survive this process is waited for (:meth:`Journal.written`) before anybody outside hears of it.
"""

from __future__ import annotations

from typing import Protocol

from .events import Event
from .groups import GroupFacts, StoredGroup

__all__ = ["Journal"]


class Journal(Protocol):
    """Where changes of the ledger are recorded: applied at once, written in the same order."""

    def record(self, event: Event) -> None:
        """Apply the event and queue it for writing."""
        ...

    def store_group(self, frame: bytes, facts: GroupFacts | None = None, prefix: bytes | None = None) -> StoredGroup:
        """A finished group enters its source's buffer.

        Args:
            frame: of the group.
            facts: what the frame says, from whoever made it; ``None``: they are read from it.
            prefix: of the record in the log, if its checksum was computed elsewhere; ``None``: it is computed here.
        """
        ...

    def store_partial(self, frame: bytes) -> None:
        """A group in flight gained a partial frame."""
        ...

    @property
    def mark(self) -> int:
        """Rises with every record."""
        ...

    async def written(self, mark: int | None = None) -> None:
        """Return when everything recorded so far, or up to ``mark``, is written: it then survives this process."""
        ...
