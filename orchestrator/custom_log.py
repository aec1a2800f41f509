"""slime names it here; see ``orchestrator.slime.custom_log``."""

from orchestrator.slime.custom_log import custom_rollout_log_function

__all__ = ["custom_rollout_log_function"]
