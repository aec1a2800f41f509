"""The import path that slime's options name; see ``orchestrator.slime.reward_cap_filter``."""

from orchestrator.slime.reward_cap_filter import check_reward_cap_per_source

__all__ = ["check_reward_cap_per_source"]
