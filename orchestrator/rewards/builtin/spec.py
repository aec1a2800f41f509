"""What a config says of a reward that comes with the daemon."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, Field, model_validator

from orchestrator.rewards.port import Reward
from orchestrator.rewards.processes import ProcessReward
from orchestrator.rewards.spec import RewardSpec
from orchestrator.schema.fields import nearest, problem

from .comparisons import BUILT_IN_REWARDS, BuiltInReward
from .packages import PACKAGE_REWARDS, missing_package

__all__ = ["REWARD_NAMES", "BuiltInSpec"]

REWARD_NAMES: Final = (*BUILT_IN_REWARDS, *PACKAGE_REWARDS)

COMPARE_WITH_LABEL: Final = (*BUILT_IN_REWARDS, "math_verify")


def _known_name(value: str) -> str:
    if value not in REWARD_NAMES:
        near = nearest(value, REWARD_NAMES)
        raise problem(
            f"{value!r} is not a built-in reward",
            f"did you mean {near}?" if near else f"the built-in rewards are {', '.join(REWARD_NAMES)}",
        )
    return value


class BuiltInSpec(RewardSpec):
    """A reward that comes with the daemon."""

    known_as = "built-in rewards"

    kind: Literal["builtin", "function"] = Field(
        "builtin",
        description="builtin: a reward that comes with the daemon; optional. function means the same if path "
        "names such a reward.",
    )
    path: Annotated[str, AfterValidator(_known_name), Field(json_schema_extra={"enum": list(REWARD_NAMES)})] = Field(
        description=f"Name of the reward: {', '.join(REWARD_NAMES)}."
    )

    @model_validator(mode="before")
    @classmethod
    def _has_a_name(cls, raw: Any) -> Any:
        if isinstance(raw, Mapping) and raw.get("path") is None:
            raise problem("the reward has no path", f"set path to one of {', '.join(REWARD_NAMES)}")
        return raw

    @model_validator(mode="after")
    def _keys_go_with_the_reward(self) -> BuiltInSpec:
        if self.key is not None:
            raise problem(
                f"key {self.key!r} is given, but {self.path} returns a number",
                "use key only for functions that return a dictionary",
            )
        if self.group:
            raise problem(
                f"group: true is given, but {self.path} scores each sample separately",
                "use group only for functions that score all samples of a group",
            )
        return self

    @property
    def name(self) -> str:
        """The name of the reward."""
        return self.path

    @property
    def needs_label(self) -> bool:
        """All but a task's own judgement compare with the label."""
        return self.path in COMPARE_WITH_LABEL

    @property
    def is_zero_or_one(self) -> bool:
        """What compares texts does."""
        return self.path in BUILT_IN_REWARDS

    def build(self, *, directory: Path | None) -> Reward:
        """In the daemon's loop, or in worker processes where a package judges.

        Raises:
            ValueError: the package is not installed.
        """
        if self.path in BUILT_IN_REWARDS:
            return BuiltInReward(self.path)
        if (missing := missing_package(self.path)) is not None:
            raise ValueError(missing)
        package = PACKAGE_REWARDS[self.path]
        return ProcessReward(
            self.path,
            function=package.function,
            directory=None,
            key="score",
            timeout_s=self.timeout_s,
            concurrency=self.concurrency,
            group=False,
            environment=package.environment,
        )
