"""What a config says of a reward, and what the rest of the daemon may ask of it without knowing its kind.

Each kind has a subclass beside its reward; ``kinds.py`` lists them.

Invariants:

* A key of another kind is an error that says so.
* Nothing is imported, started or contacted before :meth:`RewardSpec.build`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field
from pydantic_core import PydanticCustomError

from orchestrator.schema.fields import Seconds, problem
from orchestrator.schema.kinds import Kind

from .port import Reward

__all__ = ["RewardSpec"]


class RewardSpec(Kind):
    """What scores a source's responses; the keys here are those of every kind."""

    key: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="Key of the reward in a returned dictionary; null: the function returns a number."
    )
    timeout_s: Seconds = Field(30.0, description="Most seconds for one call.")
    concurrency: Annotated[int, Field(ge=1, le=1024)] = Field(
        16, description="Calls at a time; for a synchronous function also its number of processes."
    )
    group: bool = Field(
        False, description="Score all samples of a group in one call: a function (samples, prompt) that returns a list."
    )

    known_as: ClassVar[str]
    """What messages call that which scores, in the plural."""

    @classmethod
    def misplaced(cls, keys: Sequence[str], owner: type[Kind], raw: Mapping[str, Any]) -> PydanticCustomError:
        """Names what the first of the keys is for."""
        theirs = owner.known_as if issubclass(owner, RewardSpec) else owner.kind_name()
        return problem(f"{keys[0]} is for {theirs}", f"write kind: {owner.kind_name()}")

    @property
    @abstractmethod
    def name(self) -> str:
        """What is called, for messages and status."""

    @property
    def needs_label(self) -> bool:
        """Whether a prompt without a label cannot be scored."""
        return False

    @property
    def is_zero_or_one(self) -> bool:
        """Whether it gives 0 and 1 alone."""
        return False

    @abstractmethod
    def build(self, *, directory: Path | None) -> Reward:
        """The reward. Nothing is started or contacted yet; a dotted path is imported here, once.

        Args:
            directory: where a dotted path is looked up beside ``sys.path``.

        Raises:
            DottedPathError: a dotted path leads to nothing that can be called.
            ValueError: a package is not installed, or the environment has no key.
        """
