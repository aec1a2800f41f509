"""Rollout orchestrator: the daemon between inference servers and a reinforcement-learning trainer.

The package is a house of floors; imports go down only (``docs/architecture.md`` has the map). A trainer needs
``orchestrator.client`` and nothing else.
"""

__all__ = ["__version__"]

__version__ = "0.1.0"
