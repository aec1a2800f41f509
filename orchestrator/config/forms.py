"""Which of its two forms a config file has, and whether it has it wholly.

Invariants:

* Looks at the plain data, before validation, so that a wrong value elsewhere does not hide a mistake of form.
* Says nothing about values: a list that is no list is left to validation.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .document import FLAT_HOMES
from .text import Finding

__all__ = ["find_form_problems"]


def find_form_problems(data: dict[str, Any]) -> Iterator[Finding]:
    """Both forms at once, neither, half of one; lists that are not as long as there are sources; names given twice."""
    given = [key for key in FLAT_HOMES if data.get(key) is not None]
    if data.get("data_sources") is not None:
        for key in given:
            yield Finding(
                (key,),
                "is a key of the flat form, but data_sources is given too",
                f"use only one form; with data_sources write {FLAT_HOMES[key]}",
            )
        sources = data["data_sources"]
        names = [source.get("name") if isinstance(source, dict) else None for source in _items(sources)]
        yield from _find_twins(names, lambda index: ("data_sources", index, "name"))
    elif "prompt_data" in given or "prompt_data_source_names" in given:
        sources = data.get("prompt_data")
        yield from _find_flat_problems(data, given)
        names = _items(data.get("prompt_data_source_names"))
        yield from _find_twins(names, lambda index: ("prompt_data_source_names", index))
    else:
        yield Finding(
            ("data_sources",), "is missing", "list at least one source: data_sources: [{name: …, prompts: {path: …}}]"
        )
        return
    if isinstance(sources, list):
        yield from _find_wrong_lengths(data, len(sources))


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _find_flat_problems(data: dict[str, Any], given: list[str]) -> Iterator[Finding]:
    for key in given:
        section, _, name = FLAT_HOMES[key].partition(".")
        twin = data.get(section)
        if isinstance(twin, dict) and name in twin:
            yield Finding((key,), f"is given here and as {section}.{name}", "keep only one of them")
    for key, other in (("prompt_data", "one file"), ("prompt_data_source_names", "one name")):
        if key not in given:
            yield Finding((key,), "is missing", f"the flat form needs {other} for each source")


def _find_twins(names: list[Any], location: Any) -> Iterator[Finding]:
    for index, name in enumerate(names):
        if isinstance(name, str) and name in names[:index]:
            yield Finding(
                location(index), f"{name!r} is already the name of source {names.index(name)}", "names must be unique"
            )


def _find_wrong_lengths(data: dict[str, Any], sources: int) -> Iterator[Finding]:
    what = {
        "data_source_weights": "weights",
        "data_source_reward_caps": "caps",
        "prompt_data_source_names": "names",
    }
    for key, plural in what.items():
        values = data.get(key)
        if isinstance(values, list) and len(values) != sources:
            yield Finding(
                (key,),
                f"{len(values)} {plural} for {sources} sources",
                f"write one for each source, {sources} in all, in the same order",
            )
