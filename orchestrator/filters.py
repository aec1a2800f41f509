"""The import path that configs and users' filters name; see ``orchestrator.core.filters``."""

from orchestrator.core.filters import Verdict, check_reward_nonzero_std
from orchestrator.errors import FilterError

__all__ = ["FilterError", "Verdict", "check_reward_nonzero_std"]
