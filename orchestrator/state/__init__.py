"""State on disk: the log, its snapshots, and the restart (``docs/architecture.md``)."""

from .lock import StateLock
from .store import Recovery, StateStatistics, StateStore

__all__ = ["Recovery", "StateLock", "StateStatistics", "StateStore"]
