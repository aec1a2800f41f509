"""The sources of a config file: their prompts, their rewards, their buffers.

Invariants:

* What a source says of its prompts and of its reward is described beside these, in ``prompts`` and ``rewards``.
* A source without a reward is scored as its kind of prompts has it, else by ``exact_match``.
"""

from __future__ import annotations

from typing import Any, Final

from pydantic import Field, model_validator

from orchestrator.prompts.kinds import PROMPT_KINDS, AnyPrompts
from orchestrator.prompts.spec import PromptSpec
from orchestrator.rewards.kinds import AnyReward
from orchestrator.schema.fields import Bytes, Count, Section, SourceName, as_written, subsection

from .sections import Sampling

__all__ = ["Buffer", "Source"]

DEFAULT_BUFFER_BYTES: Final = 1 << 30
"""1 GiB: 250 batches of 32 groups of 8 samples of 1,280 tokens."""


class Buffer(Section):
    """Bounds of one source's buffer of finished groups; they act when a generation would be launched."""

    groups: Count | None = Field(
        None, description="Most groups in flight and buffered; null: bounded only by the plan."
    )
    bytes: Bytes = Field(DEFAULT_BUFFER_BYTES, description="Most bytes of finished groups in memory.")


class Source(Section):
    """One source of prompts."""

    name: SourceName = Field(description="Unique name, used in metric names: rollout/{name}/weight.")
    prompts: AnyPrompts = Field(description="Where the prompts come from.")
    reward: AnyReward = as_written(
        "exact_match", "What scores the responses; default for a source reasoning_gym:TASK: that task."
    )
    sampling: Sampling | None = Field(None, description="Overrides the general sampling; missing keys keep its values.")
    buffer: Buffer = subsection("Bounds on this source's buffer.")
    renamed_from: SourceName | None = Field(
        None, description="Earlier name of this source, for a start with --allow-source-changes."
    )

    @model_validator(mode="before")
    @classmethod
    def _some_prompts_bring_their_reward(cls, value: Any) -> Any:
        if not isinstance(value, dict) or "reward" in value:
            return value
        prompts = value.get("prompts")
        spec = type(prompts) if isinstance(prompts, PromptSpec) else PROMPT_KINDS.find(prompts)
        own = spec.own_reward if spec is not None and issubclass(spec, PromptSpec) else None
        return value | {"reward": own} if own is not None else value
