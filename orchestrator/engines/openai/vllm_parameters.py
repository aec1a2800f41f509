"""New parameters for a vLLM server: pause, ``reload_weights`` in its workers, forget, resume.

All of it needs the paths of its development mode. What was computed with the old parameters is forgotten, also of
requests that are kept: these are computed again from their tokens.

Invariants:

* The server is told to resume, whatever happened (``http.parameters``).
* Refused is what changed nothing. A reload that fails may have changed a part: what the server holds is then unknown.
  Version 0.32 ends altogether when it does not find the path, which cannot be seen from here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import orjson

from orchestrator.engines.http.client import EngineHttp
from orchestrator.engines.http.parameters import NO_SUCH_PATH, PAUSE_DEADLINE_S, resumed
from orchestrator.engines.port import ParameterUpdate
from orchestrator.errors import EngineError, EngineRejected, EngineUnavailable

__all__ = ["update_vllm_parameters"]


async def update_vllm_parameters(http: EngineHttp, update: ParameterUpdate) -> None:
    """See the port.

    Raises:
        EngineRejected, EngineUnavailable, EngineStalled: see the port.
    """
    async with resumed(http, "/resume"):
        mode = "keep" if update.keeps_requests else "abort"
        await _post(http, f"/pause?mode={mode}", {}, deadline_s=PAUSE_DEADLINE_S)
        reload = {"method": "reload_weights", "kwargs": {"weights_path": update.path}}
        await _post(http, "/collective_rpc", reload, deadline_s=math.inf)
        await _forget(http)


async def _post(http: EngineHttp, path: str, body: Mapping[str, object], *, deadline_s: float) -> bytes:
    try:
        return await http.ask_raw(path, body, deadline_s=deadline_s)
    except EngineRejected as error:
        if error.data.get("status") not in NO_SUCH_PATH:
            raise
        advice = f"it has no {path.partition('?')[0]}: start it with VLLM_SERVER_DEV_MODE=1 in its environment"
        raise EngineRejected(http.name, advice, data=error.data) from error


async def _forget(http: EngineHttp) -> None:
    try:
        answer = await _post(http, "/reset_prefix_cache?reset_running_requests=true", {}, deadline_s=PAUSE_DEADLINE_S)
        problem = "" if _is_success(answer) else "it gave no reason"
    except EngineError as error:
        problem = error.message
    if problem:
        raise EngineUnavailable(
            http.name,
            "it has the new parameters, but its cache still has results of the old ones: update it again with mode"
            f" abort or finish ({problem})",
        )


def _is_success(answer: bytes) -> bool:
    """Versions that answer with nothing do not know whether they succeeded, and do where nothing is in flight."""
    try:
        outcome = orjson.loads(answer)
    except orjson.JSONDecodeError:
        return True
    return not (isinstance(outcome, dict) and outcome.get("success") is False)
