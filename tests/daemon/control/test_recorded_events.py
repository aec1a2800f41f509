"""Each event is made in one place, and what changes a running daemon is recorded in ``daemon/control`` alone."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from typing import get_args

from orchestrator.core.ledger.events import Event
from tests.support.paths import ROOT

PACKAGE = ROOT / "orchestrator"

CONTROL = {
    "WeightSet": {"daemon/control/run"},
    "SourcePaused": {"daemon/control/run"},
    "SourceResumed": {"daemon/control/run"},
    "SourcesChanged": {"daemon/control/running_config", "daemon/control/sources"},
    "VersionSet": {"daemon/control/engines"},
    "ParametersHeld": {"daemon/control/engines"},
    "EngineAdded": {"daemon/control/engines"},
    "EngineDrained": {"daemon/control/engines", "core/ledger/engine_changes"},
    "EngineRemoved": {"daemon/control/engines", "core/ledger/engine_changes"},
}
"""What may be done to a running daemon. ``engine_changes`` decides what the file has overtaken; control records it."""

BY_THE_STATE = {
    "CheckpointLoaded": {"state/store"},  # part of the loading itself, which control asks for
    "SourcesChanged": {"state/recovery"},  # other sources in the file at a start
    "Dropped": {"state/salvage"},  # damaged on disk
}

AT_WORK = {
    "Launched": {"core/ledger/ledger"},
    "Dropped": {"core/mixture/mixer", "production/finisher"},
    "BatchFormed": {"core/mixture/mixer"},
    "Resplit": {"consumer/handout"},
    "LeaseAcked": {"consumer/handout"},
    "LeaseDiscarded": {"consumer/handout"},
    "Archived": {"archive/archiver", "daemon/daemon"},
}
"""What happens to groups and batches on their way."""

RECORDING = {
    "archive/archiver",
    "consumer/handout",
    "core/mixture/mixer",
    "daemon/daemon",
    "production/finisher",
    "production/intake",
    "production/launcher",
    "production/local_runner",
}
"""Modules outside of ``daemon/control`` that record an event."""


def calls() -> Iterator[tuple[str, ast.Call]]:
    """Every call in the package, with the module that it stands in."""
    for path in PACKAGE.rglob("*.py"):
        module = path.relative_to(PACKAGE).with_suffix("").as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield module, node


def name_of(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def test_each_event_is_made_where_the_tables_say() -> None:
    expected: defaultdict[str, set[str]] = defaultdict(set)
    for table in (CONTROL, BY_THE_STATE, AT_WORK):
        for event, modules in table.items():
            expected[event] |= modules
    events = {event.__name__ for event in get_args(Event)}
    found: dict[str, set[str]] = {event: set() for event in events}
    for module, call in calls():
        if name_of(call.func) in events:
            found[name_of(call.func)].add(module)
    assert found == expected


def test_who_records_events_is_known() -> None:
    found = {module for module, call in calls() if name_of(call.func) == "record"}
    outside = {module for module in found if not module.startswith(("daemon/control/", "state/"))}
    assert outside == RECORDING, "what is done to a running daemon is recorded in daemon/control"
