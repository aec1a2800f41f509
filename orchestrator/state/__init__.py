"""State on disk: the log, its snapshots, and the restart (``docs/architecture.md``)."""

from .checkpoints import check_name, list_checkpoints, remove_checkpoint, verify_checkpoint
from .counts import StateStatistics
from .lock import StateLock
from .recovery import Recovery
from .store import StateStore

__all__ = [
    "Recovery",
    "StateLock",
    "StateStatistics",
    "StateStore",
    "check_name",
    "list_checkpoints",
    "remove_checkpoint",
    "verify_checkpoint",
]
