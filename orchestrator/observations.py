"""The import path of the types that users' weight functions need; see ``orchestrator.core.observations``."""

from orchestrator.core.observations import SourceStats

__all__ = ["SourceStats"]
