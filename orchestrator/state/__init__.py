"""State on disk: the log, its snapshots, and the restart (``docs/architecture.md``)."""

from .checkpoints import check_name, list_checkpoints, remove_checkpoint, verify_checkpoint
from .lock import StateLock
from .recovery import Recovery, SourceRules
from .store import StateStore
from .writer import StateStatistics

__all__ = [
    "Recovery",
    "SourceRules",
    "StateLock",
    "StateStatistics",
    "StateStore",
    "check_name",
    "list_checkpoints",
    "remove_checkpoint",
    "verify_checkpoint",
]
