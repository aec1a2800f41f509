"""What a config says of a source's prompts, and what the rest of the daemon may ask of it without knowing its kind.

Each kind has a subclass beside its source; ``kinds.py`` lists them.

Invariants:

* A key of another kind is an error that says so.
* Nothing is opened before :meth:`PromptSpec.open`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field
from pydantic_core import PydanticCustomError

from orchestrator.schema.fields import Count, problem
from orchestrator.schema.kinds import Kind

from .port import PromptSource

__all__ = ["PromptSpec"]


class PromptSpec(Kind):
    """The prompts of a source; the keys here are those of every kind."""

    shuffle: bool = Field(True, description="Shuffle in every epoch, by the seed; false: file order.")
    epochs: Count | None = Field(None, description="How many times the prompts are used; null: no limit.")

    known_as: ClassVar[str]
    """What messages call prompts of this kind, in the plural."""

    place: ClassVar[str] = "path"
    """The key that says where the prompts are: what is found wrong on opening is reported there."""

    own_reward: ClassVar[str | None] = None
    """The reward of a source that names none; ``None``: the general default."""

    @classmethod
    def claims(cls, path: str) -> bool:
        """Whether ``path`` says by itself that it is of this kind, for files that leave ``kind`` out."""
        return False

    @classmethod
    def misplaced(cls, keys: Sequence[str], owner: type[Kind], raw: Mapping[str, Any]) -> PydanticCustomError:
        """Names what the keys are for."""
        theirs = owner.known_as if issubclass(owner, PromptSpec) else owner.kind_name()
        return problem(f"{', '.join(keys)}: only for {theirs}, not for {cls.known_as}", "remove it")

    @property
    def file(self) -> Path | None:
        """The file that the prompts are read from, if there is one."""
        return None

    @abstractmethod
    async def open(self, *, name: str, seed: int) -> PromptSource:
        """Open the source.

        Args:
            name: the source's name; part of what its order is a function of.
            seed: the run's seed, 0 or more.

        Raises:
            PromptFileError: the prompts cannot be used; the message says why.
        """
