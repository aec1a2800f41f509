"""From pydantic's errors to findings in plain words.

Invariants:

* Every error of validation becomes one finding, and none is lost: what has no sentence of ours keeps pydantic's.
* A finding's location is one of the file: the kind of a value, which stands in locations of errors, is taken out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Annotated, Any, Final, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from orchestrator.schema.fields import Section, nearest, shown
from orchestrator.schema.kinds import MARK, Kinds

from .document import ConfigFile
from .text import Finding, Location, key_path

__all__ = ["sections", "to_findings"]

FOREIGN_NAMES: Final = {
    "rollout_temperature": "sampling.temperature",
    "rollout_top_p": "sampling.top_p",
    "rollout_top_k": "sampling.top_k",
    "rollout_max_response_len": "sampling.max_new_tokens",
    "rollout_stop": "sampling.stop",
    "rollout_stop_token_ids": "sampling.stop_token_ids",
    "dynamic_sampling_filter_path": "dynamic_sampling_filter",
    "custom_rm_path": "reward",
    "rm_type": "reward",
    "num_epoch": "data_sources[…].prompts.epochs",
    "sources": "data_sources",
    "weights": "data_source_weights",
    "reward_caps": "data_source_reward_caps",
    "max_tokens": "max_new_tokens",
    "base_url": "url",
}
"""Names that other programs give to keys of ours, and that no likeness leads to."""

LISTS: Final = frozenset({"engines", "data_sources", "sinks"})
"""Lists of sections; a key in one of them cannot be named without a position."""


def to_findings(error: ValidationError) -> Iterator[Finding]:
    """One finding for each error."""
    for details in error.errors(include_url=False):
        if details["type"] != "invalid_key":  # the reading of the text has named it, with its line
            yield _finding(details)


def _finding(details: ErrorDetails) -> Finding:
    kind, location, value = details["type"], details["loc"], details["input"]
    context = details.get("ctx", {})
    place = _in_file(location)
    if kind == "config":
        return Finding((*place, *context["at"]), context["message"], context["hint"])
    if kind == "extra_forbidden":
        return Finding(place, "unknown key", _known_key(location))
    if kind == "missing":
        if isinstance(location[-1], int):
            return Finding(place[:-1], "the list is too short", "expected two numbers")
        return Finding(place, "is missing", _description(location))
    if value is None and kind.endswith(("_type", "_attributes_type")):
        return Finding(place, "is null", "remove the key to use its default, or give it a value")
    sentence = SENTENCES.get(kind)
    message, hint = sentence(value, context) if sentence is not None else (details["msg"], "")
    return Finding(place, message, hint)


def _in_file(location: Location) -> Location:
    """The location without the kinds of values."""
    return tuple(part for part in location if not (isinstance(part, str) and part.startswith(MARK)))


# -- sentences --------------------------------------------------------------------------------------------------------


def _expected(what: str, hint: str = "") -> Callable[[Any, Any], tuple[str, str]]:
    return lambda value, _: (f"expected {what}, got {shown(value)}", hint)


def _bound(words: str, key: str) -> Callable[[Any, Any], tuple[str, str]]:
    return lambda value, context: (f"is {value}", f"{words} {context[key]:.15g}")


def _number(what: str) -> Callable[[Any, Any], tuple[str, str]]:
    def sentence(value: Any, _: Any) -> tuple[str, str]:
        hint = ""
        if isinstance(value, str) and value.strip().replace(".", "", 1).lstrip("+-").isdigit():
            hint = f"remove the quotes: {value.strip()}"
        elif isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
            hint = f"write {int(value)}"
        return f"expected {what}, got {shown(value)}", hint

    return sentence


def _one_of(value: Any, context: Any) -> tuple[str, str]:
    expected = str(context["expected"])
    words = [word.strip("' ") for part in expected.split(" or ") for word in part.split(",")]
    near = next((word for word in words if isinstance(value, str) and value and word.startswith(value)), None)
    if near is None and isinstance(value, str):
        near = nearest(value, words)
    return f"got {shown(value)}", f"one of {', '.join(words)}" + (f"; did you mean {near}?" if near else "")


SENTENCES: Final[dict[str, Callable[[Any, Any], tuple[str, str]]]] = {
    "int_type": _number("a whole number"),
    "int_from_float": _number("a whole number"),
    "float_type": _number("a number"),
    "bool_type": _expected("true or false", "without quotes"),
    "string_type": _expected("a string", "put it in quotes"),
    "model_type": _expected("a mapping of keys"),
    "model_attributes_type": _expected("a mapping of keys"),
    "dict_type": _expected("a mapping of keys"),
    "tuple_type": _expected("a list"),
    "finite_number": lambda value, _: (f"is {value}", "expected a finite number"),
    "greater_than": _bound("above", "gt"),
    "greater_than_equal": _bound("at least", "ge"),
    "less_than": _bound("below", "lt"),
    "less_than_equal": _bound("at most", "le"),
    "string_too_short": lambda _value, _context: ("is empty", "expected at least one character"),
    "too_short": lambda _value, context: ("the list is too short", f"expected at least {context['min_length']}"),
    "too_long": lambda _value, context: ("the list is too long", f"expected at most {context['max_length']}"),
    "literal_error": _one_of,
}


# -- what the models know ---------------------------------------------------------------------------------------------


@cache
def sections() -> dict[tuple[str, ...], type[Section]]:
    """Every section by its path without list positions; the kind of a value is part of its path, as in locations."""
    found: dict[tuple[str, ...], type[Section]] = {}
    _collect(ConfigFile, (), found)
    return found


def _collect(model: type[Section], at: tuple[str, ...], found: dict[tuple[str, ...], type[Section]]) -> None:
    found[at] = model
    for name, field in model.model_fields.items():
        for kind, section in _models_in(field.annotation, field.metadata):
            _collect(section, (*at, name, *kind), found)


def _models_in(annotation: Any, metadata: Iterable[Any]) -> Iterator[tuple[tuple[str, ...], type[Section]]]:
    """The sections that a value may be, each with its kind as it stands in locations, or nothing."""
    if (kinds := next((item for item in metadata if isinstance(item, Kinds)), None)) is not None:
        yield from (((MARK + name,), spec) for name, spec in kinds.specs.items())
    elif isinstance(annotation, type) and issubclass(annotation, Section):
        yield (), annotation
    elif get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        yield from _models_in(inner, more)
    else:
        for argument in get_args(annotation):
            yield from _models_in(argument, ())


def _path(location: Location) -> tuple[str, ...]:
    return tuple(part for part in location if isinstance(part, str))


def _known_key(location: Location) -> str:
    """What the writer of an unknown key may have meant."""
    key, (*parents, _) = str(location[-1]), _path(location)
    known = sections()[tuple(parents)].model_fields if tuple(parents) in sections() else {}
    if (foreign := FOREIGN_NAMES.get(key)) is not None and (parents == [] or foreign in known):
        return f"did you mean {foreign}?"
    if (near := nearest(key, known)) is not None:
        return f"did you mean {near}?"
    homes = {_in_file(path) for path, section in sections().items() if key in section.model_fields}
    homes = {path for path in homes if path and LISTS.isdisjoint(path)}
    if len(homes) == 1:
        return f"did you mean {key_path((*homes.pop(), key))}?"
    return f"known keys are {', '.join(known)}"


def _description(location: Location) -> str:
    """The description of a key that is missing."""
    *parents, key = _path(location)
    section = sections().get(tuple(parents))
    field = section.model_fields.get(key) if section is not None else None
    return (field.description or "") if field is not None else ""
