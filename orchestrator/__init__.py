"""Rollout orchestrator: the daemon between inference servers and a reinforcement-learning trainer.

The package has layers, and imports only go down (``docs/architecture.md`` has the map). A trainer needs
``orchestrator.client`` and nothing else.
"""

__all__ = ["__version__"]

__version__ = "0.1.0"
