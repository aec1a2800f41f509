"""Prompts, rewards and engines from the keys that a config would have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from orchestrator.engines import Engine
from orchestrator.engines.kinds import AnyEngine
from orchestrator.prompts import PromptSource
from orchestrator.prompts.files import FileSpec
from orchestrator.prompts.kinds import AnyPrompts
from orchestrator.rewards import Reward
from orchestrator.rewards.kinds import AnyReward

ENGINE: TypeAdapter[Any] = TypeAdapter(AnyEngine)
PROMPTS: TypeAdapter[Any] = TypeAdapter(AnyPrompts)
REWARD: TypeAdapter[Any] = TypeAdapter(AnyReward)


async def open_prompts(*, name: str, seed: int = 0, **keys: Any) -> PromptSource:
    """The source, opened."""
    source: PromptSource = await PROMPTS.validate_python(keys).open(name=name, seed=seed)
    return source


def load_prompts(*, name: str, **keys: Any) -> PromptSource:
    """The source of a file, opened outside of a loop."""
    spec = PROMPTS.validate_python(keys)
    assert isinstance(spec, FileSpec)
    return spec.load(name=name)


def build_reward(path: str | None = None, *, directory: Path | None = None, **keys: Any) -> Reward:
    """The reward; ``path`` stands for itself, as in a config."""
    reward: Reward = REWARD.validate_python(keys | ({} if path is None else {"path": path})).build(directory=directory)
    return reward


def build_engine(keys: dict[str, Any], *, workdir: Path) -> Engine:
    """The engine."""
    engine: Engine = ENGINE.validate_python(keys).build(workdir=workdir)
    return engine
