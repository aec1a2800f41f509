"""What a worker process does for a reward: calls the function, puts what it returned or raised into words.

Invariants:

* An answer is ``{"results": [[value, detail], …]}`` or ``{"error": text}``, whatever the function does, as long as its
  process lives.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.concurrency.processes import ServiceRefused
from orchestrator.core.dotted import resolve
from orchestrator.errors import DottedPathError, RewardError

from .verdict import describe_exception, to_results
from .wire import decode_call

__all__ = ["serve"]


def serve(options: dict[str, Any]) -> Callable[[dict[str, Any], bytes], dict[str, Any]]:
    """The service of one function.

    Args:
        options: ``name``, ``function`` (its dotted path), ``directory`` (where that is looked up, or ``None``),
            ``key``, ``group``.

    Raises:
        ServiceRefused: the path leads to no function.
    """
    directory = options["directory"]
    try:
        function = resolve(options["function"], directory=None if directory is None else Path(directory))
    except DottedPathError as error:
        raise ServiceRefused(error.message) from error
    name, key, group = options["name"], options["key"], options["group"]

    def call(header: dict[str, Any], data: bytes) -> dict[str, Any]:
        samples, prompt = decode_call(header, data)
        try:
            value = function(samples if group else samples[0], prompt)
            results = to_results(name, value, key, len(samples) if group else None)
        except RewardError as error:
            return {"error": error.message}
        except Exception as error:  # noqa: BLE001 - whatever user code raises is its answer
            return {"error": f"reward {name}: it raised {describe_exception(error)}"}
        return {"results": [[result.value, result.detail] for result in results]}

    return call
