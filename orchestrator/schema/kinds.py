"""A mapping of a config that is one of several kinds: an engine, the prompts of a source, a reward, a sink.

A kind is described by its spec, a subclass of :class:`Kind` that stands beside the adapter. A registry is one
:class:`Kinds` with all specs of one port; ``Annotated[Base, REGISTRY]`` is the type of such a value in a model.

Invariants:

* The registry alone knows which kinds there are. Whoever else needs to know something of a kind asks its spec.
* A mapping is validated by exactly one spec, so that errors speak of the keys of that kind only.
* In the location of an error, the kind stands as :data:`MARK` and its name; ``config.messages`` takes it out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Final, get_args

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from .fields import Section, nearest, problem, shown

__all__ = ["MARK", "Kind", "Kinds"]

MARK: Final = "kind="
"""Begins the part of a location that names the kind."""


class Kind(Section):
    """What the specs of all kinds have in common.

    A spec narrows ``kind`` to a ``Literal``. Its first text is the kind's name; a spec whose kind may be left out in a
    file has it as default.
    """

    kind: str

    also_called: ClassVar[tuple[str, ...]] = ()
    """Names under which users may look for this kind, for the "did you mean" of an unknown kind."""

    @classmethod
    def kind_name(cls) -> str:
        """The name of the kind."""
        return str(get_args(cls.model_fields["kind"].annotation)[0])

    @classmethod
    def misplaced(cls, keys: Sequence[str], owner: type[Kind], raw: Mapping[str, Any]) -> PydanticCustomError | None:
        """What to say of keys that are not of this kind but of another one; ``None``: that they are unknown.

        Args:
            keys: the keys, as far as ``owner`` has them.
            owner: the first kind that has the first of them.
            raw: the whole mapping.
        """
        return None


class Kinds:
    """All kinds of one port, in the order in which messages list them.

    Args:
        specs: one for each kind.
        choose: from a mapping to the name of its kind, for ports whose kind may be left out; ``None`` where the
            mapping does not say. May raise a ``problem``. By default the kind is what ``kind`` says.
    """

    def __init__(
        self, *specs: type[Kind], choose: Callable[[Mapping[Any, Any]], object] = lambda raw: raw.get("kind")
    ) -> None:
        self.specs: Final = {spec.kind_name(): spec for spec in specs}
        self._choose = choose
        self._other_names = {name: spec.kind_name() for spec in specs for name in spec.also_called}

    def find(self, raw: object) -> type[Kind] | None:
        """The spec of a mapping, if it has one."""
        try:
            return self._spec_of(raw) if isinstance(raw, Mapping) else None
        except PydanticCustomError:
            return None

    def _spec_of(self, raw: Mapping[Any, Any]) -> type[Kind]:
        name, known = self._choose(raw), f"known kinds are {', '.join(self.specs)}"
        if name is None:
            raise problem("is missing", known, at=("kind",))
        if isinstance(name, str):
            if (spec := self.specs.get(name)) is not None:
                return spec
            if (near := self._other_names.get(name) or nearest(name, self.specs)) is not None:
                known += f"; did you mean {near}?"
        raise problem(f"got {shown(name)}", known, at=("kind",))

    def _checked(self, value: Any) -> Any:
        """The value, if it is a spec or the mapping of one kind without keys that belong to another."""
        if isinstance(value, Kind):
            return value
        if value is None:
            raise problem("is null", "remove the key to use its default, or give it a value")
        if not isinstance(value, dict):
            raise problem(f"expected a mapping of keys, got {shown(value)}")
        spec = self._spec_of(value)
        foreign = [key for key in value if isinstance(key, str) and key not in spec.model_fields]
        for owner in self.specs.values():
            keys = [key for key in foreign if key in owner.model_fields]
            if keys and (error := spec.misplaced(keys, owner, value)) is not None:
                raise error
        return value

    def _mark(self, value: Any) -> str:
        spec = type(value) if isinstance(value, Kind) else self._spec_of(value)
        return MARK + spec.kind_name()

    # -- as an annotation of pydantic ----------------------------------------------------------------------------------

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        choices = {MARK + name: handler.generate_schema(spec) for name, spec in self.specs.items()}
        union = core_schema.tagged_union_schema(choices, discriminator=self._mark)
        return core_schema.no_info_before_validator_function(self._checked, union)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        result = handler(schema)
        if any(not spec.model_fields["kind"].is_required() for spec in self.specs.values()) and "oneOf" in result:
            result["anyOf"] = result.pop("oneOf")  # a mapping without `kind` may have the form of several
        return result
