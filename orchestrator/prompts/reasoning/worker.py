"""What the worker processes of a source of reasoning-gym run.

Invariants:

* Imports what making entries needs and nothing else: a process starts whenever one was killed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson

from orchestrator.concurrency.processes import ServiceRefused
from orchestrator.concurrency.processes.reasoning_tasks import BadTask, Entries, TaskSpec

__all__ = ["serve"]


def serve(spec: dict[str, Any]) -> Callable[[dict[str, Any], bytes], dict[str, Any]]:
    """What the worker process does: from ``{"index"}`` to ``{"question", "answer", "metadata"}`` or ``{"error"}``.

    Raises:
        ServiceRefused: there is no such task, or it refuses its options.
    """
    try:
        entries = Entries(TaskSpec(**spec))
    except BadTask as error:
        raise ServiceRefused(str(error)) from error

    def call(header: dict[str, Any], _: bytes) -> dict[str, Any]:
        try:
            entry = entries.entry(header["index"])
            plain = orjson.loads(orjson.dumps(entry, option=orjson.OPT_NON_STR_KEYS | orjson.OPT_SERIALIZE_NUMPY))
        except Exception as error:  # noqa: BLE001 - whatever a task raises costs this entry
            return {"error": f"{type(error).__name__}: {error}"[:1000]}
        return {"question": plain["question"], "answer": plain["answer"], "metadata": plain.get("metadata") or {}}

    return call
