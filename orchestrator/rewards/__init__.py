"""Rewards: from finished samples to numbers, by a built-in, a function of the user's, a package, or a server.

``port.py`` says what the rest of the daemon knows of a reward, ``kinds.py`` lists the kinds. This module imports the
port alone: worker processes import it too, and need neither models of the config nor an HTTP client.
"""

from .port import Reward, RewardResult, RewardStatistics, RewardUnavailable

__all__ = ["Reward", "RewardResult", "RewardStatistics", "RewardUnavailable"]
