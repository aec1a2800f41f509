"""The import path that slime's options name; see ``orchestrator.slime.data_source``."""

from orchestrator.slime.data_source import MultipleWeightedRolloutDataSourceWithBuffer

__all__ = ["MultipleWeightedRolloutDataSourceWithBuffer"]
