"""Every failure of this project has a type here, and a message that says what to do about it.

Invariants:

* One root, :class:`OrchestratorError`; each error is also the standard-library type that a caller who does not know
  this project would catch.
* One condition each. ``code`` is the ``snake_case`` name of the condition on the wire (``docs/protocol.md``).
* A failed *rollout* is data and never travels as an exception beyond its producer; a failed *component* does, and
  stops the daemon.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

__all__ = [
    "AlreadyRunning",
    "ArchiveError",
    "BadRequest",
    "BadWorldSize",
    "BatchTimeout",
    "CheckpointError",
    "ConfigError",
    "ConfigProblem",
    "ConfigRefused",
    "ConnectionLost",
    "CorruptState",
    "DottedPathError",
    "EngineError",
    "EngineRejected",
    "EngineStalled",
    "EngineUnavailable",
    "ExpressionError",
    "FilterError",
    "ForeignState",
    "FrameError",
    "GenerationFailed",
    "LeaseUnknown",
    "NotAllowed",
    "NotWritten",
    "OrchestratorError",
    "PromptFileError",
    "PromptUnavailable",
    "RankInUse",
    "RemoteError",
    "RequestCancelled",
    "RewardError",
    "RewardTimeout",
    "RunFinished",
    "ShuttingDown",
    "SourceUnknown",
    "StateError",
    "TokenizerError",
    "TooManyConnections",
    "UpdateFailed",
    "VersionWentBack",
    "WeightError",
]


class OrchestratorError(Exception):
    """Root of all errors of this project.

    ``data`` is a JSON-compatible object that travels with the error over the wire.
    """

    code: ClassVar[str] = "internal"

    def __init__(self, message: str, *, data: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.data: dict[str, Any] = data or {}


# -- configuration ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ConfigProblem:
    """One thing that is wrong in a config file.

    ``line`` counts from 1 and is ``None`` where no line can be named; ``key`` is a path such as
    ``data_sources[1].prompts.path``; ``hint`` says what would be right.
    """

    key: str
    message: str
    line: int | None = None
    hint: str = ""

    def render(self, file: str) -> str:
        """One line of text: ``file:line: key: message (hint)``."""
        place = f"{file}:{self.line}" if self.line is not None else file
        subject = f"{self.key}: " if self.key else ""
        return f"{place}: {subject}{self.message}" + (f" ({self.hint})" if self.hint else "")


class ConfigError(OrchestratorError, ValueError):
    """A config file cannot be used; ``problems`` lists everything that is wrong in it, not only the first problem."""

    code = "bad_config"

    def __init__(self, file: str, problems: list[ConfigProblem]) -> None:
        super().__init__("\n".join(problem.render(file) for problem in problems))
        self.file = file
        self.problems = problems


class ConfigRefused(OrchestratorError, ValueError):
    """A changed config cannot be applied, and the previous one stays in force. The message has every problem."""

    code = "config_refused"


class ExpressionError(OrchestratorError, ValueError):
    """A ``lambda step: …`` text is not an allowed expression."""

    code = "bad_expression"


class DottedPathError(OrchestratorError, ImportError):
    """A dotted path does not lead to something callable."""

    code = "bad_dotted_path"


class WeightError(OrchestratorError, ValueError):
    """A weight is not finite, negative, or all weights of a step are zero."""

    code = "bad_weight"


class PromptFileError(OrchestratorError, ValueError):
    """A prompt file cannot be read; the message names file and line (or row)."""

    code = "bad_prompt_file"


class PromptUnavailable(OrchestratorError, RuntimeError):
    """One prompt cannot be used, though its source works; only its group is lost."""

    code = "prompt_unavailable"


class FilterError(OrchestratorError, RuntimeError):
    """A filter cannot be used, raised, or returned something that is not a verdict."""

    code = "filter_error"


class TokenizerError(OrchestratorError, ValueError):
    """The run's own tokenizer cannot be loaded, or cannot take a prompt."""

    code = "bad_tokenizer"


# -- engines and rewards ----------------------------------------------------------------------------------------------


class EngineError(OrchestratorError, RuntimeError):
    """An engine did not do what was asked of it; ``engine`` is its name. The tokens received so far are kept."""

    code = "engine_error"

    def __init__(self, engine: str, message: str, *, data: dict[str, Any] | None = None) -> None:
        super().__init__(f"engine {engine}: {message}", data=data)
        self.engine = engine


class EngineUnavailable(EngineError, ConnectionError):
    """Connection refused, reset or broken, or a 5xx answer; retry later or on another engine."""

    code = "engine_unavailable"


class EngineStalled(EngineError, TimeoutError):
    """No token for ``stall_s``, or no end within ``request_timeout_s``; retry on another engine."""

    code = "engine_stalled"


class EngineRejected(EngineError, ValueError):
    """A 4xx answer (context overflow, bad token ids, unknown option): the same request would fail everywhere."""

    code = "engine_rejected"


class UpdateFailed(OrchestratorError, RuntimeError):
    """No engine loaded the new parameters; ``data["engines"]`` gives the reason for each."""

    code = "update_failed"


class GenerationFailed(OrchestratorError, RuntimeError):
    """A sample used up its retries, or was rejected; ``attempts`` lists what was tried."""

    code = "generation_failed"


class RewardError(OrchestratorError, RuntimeError):
    """A reward function raised, crashed its process, or returned something that is not a finite number."""

    code = "reward_error"


class RewardTimeout(RewardError, TimeoutError):
    """A reward function did not answer within its deadline; its worker process was killed."""

    code = "reward_timeout"


# -- state ------------------------------------------------------------------------------------------------------------


class StateError(OrchestratorError, OSError):
    """The state directory cannot be used."""

    code = "state_error"


class AlreadyRunning(StateError):
    """Another daemon holds the state directory or the socket."""

    code = "already_running"


class CorruptState(StateError):
    """A record or a snapshot fails its checksum, and there is no older one to use instead."""

    code = "corrupt_state"


class ForeignState(StateError):
    """The state directory belongs to another configuration; the message lists the sources of both."""

    code = "foreign_state"


class CheckpointError(StateError):
    """No checkpoint of that name, a damaged one, or one of another state; the state of the daemon is unchanged."""

    code = "bad_checkpoint"


class ArchiveError(StateError):
    """The archive has no such step, or cannot be read."""

    code = "archive_error"


class NotWritten(StateError):
    """What was asked for is in force, but was not written to disk before the deadline of the answer."""

    code = "not_written"


# -- the consumer API -------------------------------------------------------------------------------------------------


class FrameError(OrchestratorError, ValueError):
    """Bytes that are not a frame of the protocol, or break one of its limits; the connection is closed."""

    code = "bad_frame"


class BadRequest(OrchestratorError, ValueError):
    """A request with an unknown method, or parameters of the wrong name, type or range."""

    code = "bad_request"


class NotAllowed(OrchestratorError, PermissionError):
    """The process at the other end runs under a user that may not use the socket; the connection is closed."""

    code = "not_allowed"


class TooManyConnections(OrchestratorError, ConnectionRefusedError):
    """The limit of connections is reached: a new one was refused, or an idle one was closed for it."""

    code = "too_many_connections"


class BadWorldSize(BadRequest):
    """A batch cannot be divided equally among that many ranks."""

    code = "bad_world_size"


class SourceUnknown(OrchestratorError, LookupError):
    """No source of that name."""

    code = "unknown_source"


class LeaseUnknown(OrchestratorError, LookupError):
    """No lease of that name was ever handed out, or it was ended by ``load`` or another world size."""

    code = "lease_expired"


class RankInUse(OrchestratorError, PermissionError):
    """Another live connection already takes batches under this rank."""

    code = "rank_in_use"


class VersionWentBack(BadRequest):
    """A policy version below the one in force."""

    code = "version_went_back"


class BatchTimeout(OrchestratorError, TimeoutError):
    """No batch within ``timeout_s``; ``data`` holds the cause."""

    code = "timeout"


class RunFinished(OrchestratorError, EOFError):
    """The run has handed out its last batch."""

    code = "finished"


class ShuttingDown(OrchestratorError, ConnectionAbortedError):
    """The daemon is draining and forms no more batches."""

    code = "shutting_down"


class RequestCancelled(OrchestratorError, InterruptedError):
    """The request was cancelled by ``cancel``."""

    code = "cancelled"


class RemoteError(OrchestratorError, RuntimeError):
    """The daemon answered with an error code that this client has no type for; ``remote_code`` is that code."""

    code = "remote_error"

    def __init__(self, remote_code: str, message: str, *, data: dict[str, Any] | None = None) -> None:
        super().__init__(message, data=data)
        self.remote_code = remote_code


class ConnectionLost(OrchestratorError, ConnectionError):
    """The connection to the daemon broke; leases that were not acknowledged will be handed out again."""

    code = "connection_lost"
