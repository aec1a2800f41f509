"""Errors of the daemon, as this side raises them.

Invariants:

* The type follows the ``code`` alone; ``message`` and ``data`` are the daemon's own.
* A code without a type here (a newer daemon) becomes :class:`~orchestrator.errors.RemoteError`, which carries the code.
"""

from __future__ import annotations

from typing import Any, Final

from orchestrator import errors as e

__all__ = ["ERROR_TYPES", "error_from_wire"]

ERROR_TYPES: Final[dict[str, type[e.OrchestratorError]]] = {
    kind.code: kind
    for kind in (
        e.AlreadyRunning,
        e.BadRequest,
        e.BadWorldSize,
        e.BatchTimeout,
        e.CheckpointError,
        e.ConfigRefused,
        e.CorruptState,
        e.DottedPathError,
        e.ExpressionError,
        e.ForeignState,
        e.FrameError,
        e.LeaseUnknown,
        e.NotAllowed,
        e.NotWritten,
        e.OrchestratorError,
        e.PromptFileError,
        e.RankInUse,
        e.RequestCancelled,
        e.RunFinished,
        e.ShuttingDown,
        e.SourceUnknown,
        e.StateError,
        e.TooManyConnections,
        e.UpdateFailed,
        e.VersionWentBack,
        e.WeightError,
    )
}
"""Wire code → type, for every error that an answer may carry."""


def error_from_wire(error: Any) -> e.OrchestratorError:
    """The exception for the ``error`` object of an answer.

    Raises:
        FrameError: it is not ``{"code": <string>, "message": <string>, "data": {…}}``.
    """
    if not isinstance(error, dict) or not isinstance(error.get("code"), str):
        raise e.FrameError("the error of an answer needs a string `code`")
    code, message, data = error["code"], error.get("message", ""), error.get("data")
    if not isinstance(message, str) or not isinstance(data, dict | None):
        raise e.FrameError("the error of an answer needs a string `message` and an object `data`")
    kind = ERROR_TYPES.get(code)
    return e.RemoteError(code, message, data=data) if kind is None else kind(message, data=data)
