"""What Elasticsearch would make of a log line, given the committed templates; strict where it would be lenient.

Elasticsearch refuses a document whose values do not fit the types of its fields, and leaves a field that the templates
do not name out of the index (``dynamic: false``). Both are errors here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from tests.support.paths import ROOT

ELK = ROOT / "deploy" / "elk"
HEAD = ["@timestamp", "log.level", "message"]
TEXT = {"keyword", "match_only_text", "wildcard"}


def template() -> dict[str, Any]:
    """The properties of the index: those of all component templates, which do not contradict each other."""
    properties: dict[str, Any] = {}
    for path in sorted(ELK.glob("component-*.json")):
        for name, field in json.loads(path.read_text())["template"]["mappings"]["properties"].items():
            assert name not in properties, f"{name} is in two component templates"
            properties[name] = field
    return properties


def problems(line: Mapping[str, Any], properties: Mapping[str, Any]) -> list[str]:
    """What is wrong with a line; nothing, where all is well."""
    found = [] if list(line)[:3] == HEAD else [f"begins with {list(line)[:3]}"]
    return found + [f"{where}: {what}" for where, what in _misfits(line, properties, "")]


def _misfits(line: Mapping[str, Any], properties: Mapping[str, Any], place: str) -> Iterator[tuple[str, str]]:
    for key, value in line.items():
        where = f"{place}{key}"
        *parents, leaf = key.split(".")
        if parents and where != "log.level":
            yield where, "a dotted key"
            continue
        known = properties
        for parent in parents:
            known = known[parent]["properties"]
        field = known.get(leaf)
        if field is None:
            yield where, "no such field in the templates"
        elif "properties" in field:
            if isinstance(value, Mapping):
                yield from _misfits(value, field["properties"], f"{where}.")
            else:
                yield where, f"{value!r} where an object is mapped"
        elif not fits(field["type"], value):
            yield where, f"{value!r} is no {field['type']}"


def fits(kind: str, value: object) -> bool:
    """Whether a field of that type takes the value without changing it."""
    if value is None:
        return True
    if kind in TEXT:
        return isinstance(value, str)
    if kind == "date":
        return isinstance(value, str) and value.endswith("Z") and datetime.fromisoformat(value).tzinfo is not None
    if kind == "long":
        return isinstance(value, int) and not isinstance(value, bool) and -(1 << 63) <= value < 1 << 63
    if kind == "double":
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind == "flattened":
        parts = value if isinstance(value, list) else [value]
        return all(isinstance(part, Mapping) for part in parts)
    raise AssertionError(f"the templates use the type {kind!r}, of which this knows nothing")
