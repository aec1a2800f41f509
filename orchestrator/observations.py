"""Users' weight functions import their types here; see ``orchestrator.core.observations``."""

from orchestrator.core.observations import SourceStats

__all__ = ["SourceStats"]
