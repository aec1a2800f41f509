"""Configs name the built-in filters here; see ``orchestrator.core.filters``."""

from orchestrator.core.filters import check_reward_nonzero_std

__all__ = ["check_reward_nonzero_std"]
