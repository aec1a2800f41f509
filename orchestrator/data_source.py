"""slime names it here; see ``orchestrator.slime.data_source``."""

from orchestrator.slime.data_source import MultipleWeightedRolloutDataSourceWithBuffer

__all__ = ["MultipleWeightedRolloutDataSourceWithBuffer"]
