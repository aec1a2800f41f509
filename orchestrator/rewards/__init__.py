"""Rewards: from a finished sample to a number, by a built-in or by a function of the user's.

:func:`build_reward` is the way in; ``port.py`` says what the rest of the house knows of a reward.
"""

from .build import build_reward
from .port import Reward, RewardResult, RewardStatistics

__all__ = ["Reward", "RewardResult", "RewardStatistics", "build_reward"]
