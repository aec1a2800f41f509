"""The import path that slime's options name; see ``orchestrator.slime.custom_log``."""

from orchestrator.slime.custom_log import custom_rollout_log_function

__all__ = ["custom_rollout_log_function"]
