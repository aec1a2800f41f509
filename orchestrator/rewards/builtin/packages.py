"""Rewards that are other people's packages: which there are, and what runs in their worker processes.

Invariants:

* The packages are imported in worker processes only; here is only looked whether they are there.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Final, NamedTuple

from orchestrator.concurrency.processes.reasoning_tasks import HASH_SEED

__all__ = ["PACKAGE_REWARDS", "PackageReward", "missing_package"]


class PackageReward(NamedTuple):
    """``module`` must be installed; ``function`` is what a worker process calls; ``environment`` its variables."""

    module: str
    distribution: str
    function: str
    environment: Mapping[str, str]


PACKAGE_REWARDS: Final[dict[str, PackageReward]] = {
    "math_verify": PackageReward("math_verify", "math-verify", "orchestrator.rewards.builtin.mathematics.score", {}),
    "reasoning_gym": PackageReward(
        "reasoning_gym",
        "reasoning-gym",
        "orchestrator.rewards.builtin.reasoning.score",
        HASH_SEED,  # as where the prompt was made
    ),
}
"""By the name under which the config knows them."""


def missing_package(name: str) -> str | None:
    """What to do before the reward ``name`` can be used; ``None``: nothing."""
    package = PACKAGE_REWARDS[name]
    if importlib.util.find_spec(package.module) is not None:
        return None
    return f"{name} needs the package {package.distribution}: pip install 'rollout-orchestrator[rewards]'"
