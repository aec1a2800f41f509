"""New parameters for a SGLang server: pause, ``/update_weights_from_disk``, flush, continue.

Requests that are kept are put back into the queue while the server is paused (``retract``): what was computed of them
with the old parameters is flushed, and computed again with the new ones. Left where they are (``in_place``) they, and
every later prompt that begins like one before, would go on from the old ones.

Invariants:

* The server is told to continue, whatever happened (``http.parameters``).
* Refused is what changed nothing: the server itself rolls back an update that it reports as failed.
* A server is told to flush by itself only while it is empty: one that cannot dies of it.
"""

from __future__ import annotations

import math

import msgspec

from orchestrator.engines.http.client import EngineHttp
from orchestrator.engines.http.parameters import NO_SUCH_PATH, PAUSE_DEADLINE_S, resumed
from orchestrator.engines.port import ParameterUpdate
from orchestrator.errors import EngineError, EngineRejected, EngineUnavailable

__all__ = ["update_sglang_parameters"]


class _Outcome(msgspec.Struct):
    success: bool
    message: str = "no message"


async def update_sglang_parameters(http: EngineHttp, update: ParameterUpdate) -> None:
    """See the port.

    Raises:
        EngineRejected, EngineUnavailable, EngineStalled: see the port.
    """
    async with resumed(http, "/continue_generation"):
        await _pause(http, keeps_requests=update.keeps_requests)
        await _load(http, update)
        if update.keeps_requests:
            await _flush(http)


async def _pause(http: EngineHttp, *, keeps_requests: bool) -> None:
    """Older servers cannot be paused: they let new requests wait during an update, and wait for those in flight."""
    body = {"mode": "retract" if keeps_requests else "abort"}
    try:
        await http.ask_raw("/pause_generation", body, deadline_s=PAUSE_DEADLINE_S)
    except EngineRejected as error:
        if error.data.get("status") not in NO_SUCH_PATH:
            raise


async def _load(http: EngineHttp, update: ParameterUpdate) -> None:
    path = "/update_weights_from_disk"
    body = {
        "model_path": update.path,
        "weight_version": str(update.version),
        "flush_cache": not update.keeps_requests,
    }
    try:
        outcome = await http.ask(path, _Outcome, body, deadline_s=math.inf)
    except EngineRejected as error:
        if error.data.get("status") not in NO_SUCH_PATH:
            raise
        advice = f"it has no {path}: restart it with the new parameters, then call set_policy_version"
        raise EngineRejected(http.name, advice, data=error.data) from error
    if not outcome.success:
        raise EngineRejected(http.name, f"{path}: {outcome.message}")


async def _flush(http: EngineHttp) -> None:
    try:
        await http.ask_raw("/flush_cache", {}, deadline_s=PAUSE_DEADLINE_S)
    except EngineError as error:
        raise EngineUnavailable(
            http.name,
            "it has the new parameters, but its cache still has results of the old ones: update it again with mode"
            f" abort or finish ({error.message})",
        ) from error
