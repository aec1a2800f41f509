"""Configs and users' filters name these here; see ``orchestrator.core.filters``."""

from orchestrator.core.filters import FilterError, Verdict, check_reward_nonzero_std

__all__ = ["FilterError", "Verdict", "check_reward_nonzero_std"]
