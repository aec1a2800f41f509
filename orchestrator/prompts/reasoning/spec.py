"""What a config says of prompts that are entries of a task of reasoning-gym.

Invariants:

* ``path`` is ``reasoning_gym:TASK`` in a loaded config; where a file has ``kind``, it may leave the prefix out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field, JsonValue
from pydantic_core import PydanticCustomError

from orchestrator.concurrency.processes.reasoning_tasks import PREFIX, TaskSpec
from orchestrator.prompts.port import PromptSource
from orchestrator.prompts.spec import PromptSpec
from orchestrator.schema.fields import problem
from orchestrator.schema.kinds import Kind

from .source import ReasoningPrompts

__all__ = ["ReasoningSpec"]

DEFAULT_SIZE: Final = 10_000


def _task_path(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if re.fullmatch(r"\w+", value.removeprefix(PREFIX)) is None:
        raise problem(f"{value!r} does not name a task", f"write {PREFIX}TASK, such as {PREFIX}chain_sum")
    return value if value.startswith(PREFIX) else PREFIX + value


class ReasoningSpec(PromptSpec):
    """Prompts that are entries of a task of reasoning-gym; the task scores them unless the source has a reward."""

    known_as = f"tasks (path: {PREFIX}TASK)"
    own_reward = "reasoning_gym"

    kind: Literal["reasoning_gym"] = Field(
        "reasoning_gym",
        description="reasoning_gym: a procedural task of the package reasoning-gym; the default if path starts "
        "with reasoning_gym:.",
    )
    path: Annotated[str, BeforeValidator(_task_path, json_schema_input_type=str)] = Field(
        description="reasoning_gym:TASK; if kind is set, just TASK."
    )
    size: Annotated[int, Field(ge=1, le=1 << 32)] | None = Field(
        None, description="Tasks only: number of prompts in an epoch; null: 10000."
    )
    seed: Annotated[int, Field(ge=0, lt=1 << 32)] | None = Field(
        None, description="Tasks only: seed of the prompts; null: run.seed."
    )
    options: dict[str, JsonValue] = Field({}, description="Tasks only: the task's own parameters, such as min_terms.")

    @classmethod
    def claims(cls, path: str) -> bool:
        """By the prefix."""
        return path.startswith(PREFIX)

    @classmethod
    def misplaced(cls, keys: Sequence[str], owner: type[Kind], raw: Mapping[str, Any]) -> PydanticCustomError:
        """Keys of rows."""
        return problem(f"{', '.join(keys)}: only for prompt files, not for {raw.get('path')}", "remove it")

    async def open(self, *, name: str, seed: int) -> PromptSource:
        """Start a process, and make the first entry.

        Raises:
            PromptFileError: the package is not installed, there is no such task, or it refuses its options.
        """
        task = TaskSpec(
            self.path.removeprefix(PREFIX),
            seed if self.seed is None else self.seed,
            self.size or DEFAULT_SIZE,
            self.options,
        )
        return await ReasoningPrompts.open(name, task, shuffle=self.shuffle, epochs=self.epochs, seed=seed)
