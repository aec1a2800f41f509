"""What is used of the answers of an OpenAI-compatible server, and of vLLM's own paths.

Invariants:

* Token ids are checked where they come in: they fit into the 4 bytes that samples hold them in.
"""

from __future__ import annotations

from typing import Annotated, Final, NoReturn

import msgspec

from orchestrator.engines.http.client import EngineHttp, TokenId
from orchestrator.engines.port import FinishReason
from orchestrator.errors import EngineUnavailable

__all__ = [
    "REASONS",
    "TEXT_ALONE",
    "ChatCompletion",
    "ChatEvent",
    "Choice",
    "Completion",
    "Event",
    "Logprobs",
    "Model",
    "Models",
    "Problem",
    "Prompt",
    "Tokens",
    "Version",
    "found_model",
    "refuse",
]

TEXT_ALONE: Final = "use dialect: chat if you want samples with text only"

REASONS: Final[dict[str, FinishReason]] = {"stop": "stop", "length": "length", "abort": "abort"}
"""Why a completion ended, in the server's words and in ours."""


class Version(msgspec.Struct):
    """vLLM's ``/version``."""

    version: str


class Model(msgspec.Struct):
    """One of ``/v1/models``; ``max_model_len`` bounds prompt and response together."""

    id: str
    max_model_len: int | None = None


class Models(msgspec.Struct):
    """``/v1/models``."""

    data: list[Model]


class Logprobs(msgspec.Struct):
    """Of the drawn tokens, one each."""

    token_logprobs: list[float | None] = []


class Choice(msgspec.Struct):
    """A completion, or what an event adds to it.

    ``stop_reason`` of vLLM: the stop token or stop text that ended it, null where the sequence ended by itself.
    """

    text: str = ""
    token_ids: list[TokenId] | None = None
    logprobs: Logprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | msgspec.UnsetType | None = msgspec.UNSET


class Completion(msgspec.Struct):
    """An answer without a stream."""

    choices: list[Choice]


class Problem(msgspec.Struct):
    """The error that a stream ends with; ``code`` is a status, or a word."""

    message: str = "no message"
    code: int | str | None = None


class Event(msgspec.Struct):
    """An event of a stream."""

    choices: list[Choice] = []
    error: Problem | None = None


class Tokens(msgspec.Struct):
    """vLLM's ``/tokenize``."""

    tokens: list[TokenId]
    token_strs: list[str] | None = None


class Prompt(msgspec.Struct):
    """vLLM's ``/detokenize``."""

    prompt: str


class Delta(msgspec.Struct):
    """What an event adds to a message."""

    content: str | None = None


class ChatChoice(msgspec.Struct):
    """What an event of a chat adds."""

    delta: Delta = msgspec.field(default_factory=Delta)
    finish_reason: str | None = None


class ChatEvent(msgspec.Struct):
    """An event of a streamed chat."""

    choices: list[ChatChoice] = []
    error: Problem | None = None


class ChatAnswer(msgspec.Struct):
    """A message of the assistant."""

    message: Delta


class ChatCompletion(msgspec.Struct):
    """A chat's answer without a stream."""

    choices: Annotated[list[ChatAnswer], msgspec.Meta(min_length=1)]


async def found_model(http: EngineHttp, wanted: str | None) -> Model:
    """The model to ask for; ``None``: the first that the server lists.

    Raises:
        EngineUnavailable: the server does not serve it; or what :meth:`EngineHttp.ask` raises.
    """
    models = (await http.ask("/v1/models", Models)).data
    for model in models:
        if wanted in (None, model.id):
            return model
    known = ", ".join(model.id for model in models) or "none"
    raise EngineUnavailable(http.name, f"it does not serve the model {wanted!r}, only: {known}")


def refuse(http: EngineHttp, path: str, problem: Problem) -> NoReturn:
    """Raise what an error that a stream ends with becomes.

    Raises:
        EngineRejected, EngineUnavailable: by its status.
    """
    status = problem.code if isinstance(problem.code, int) and problem.code >= 400 else 500
    http.refuse(status, f"{path}: {problem.message}")
