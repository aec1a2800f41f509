"""What a config says of an OpenAI-compatible server."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from orchestrator.engines.spec import KEY_VARIABLE, EngineName, InFlight, KeyVariable, Logprobs, ServerSpec
from orchestrator.schema.fields import ServerUrl

from .engine import OpenAIEngine

__all__ = ["OpenAISpec"]


class OpenAISpec(ServerSpec):
    """An OpenAI-compatible server, such as vLLM."""

    adapter = OpenAIEngine
    also_called = ("vllm",)

    kind: Literal["openai"] = Field(description="openai: a running vLLM, or another OpenAI-compatible server.")
    url: ServerUrl = Field(description="http://HOST:PORT of the server; not of a router.")
    model: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="Model to use; null: the first one that the server lists."
    )
    dialect: Literal["auto", "vllm", "generic", "llamacpp", "chat"] = Field(
        "auto",
        description="vllm: a vLLM server; generic: another that gives token ids; llamacpp: a llama.cpp server; auto: "
        "which of these is found out. chat: texts alone by /v1/chat/completions, without token ids and "
        "log-probabilities; never found out, because it has to be wanted.",
    )
    api_key_env: KeyVariable = Field(None, description=KEY_VARIABLE)
    max_in_flight: InFlight = Field(256, description="Requests at a time; the server queues what it does not run.")
    name: EngineName | None = Field(None, description="Unique name in logs and status; null: host:port.")
    logprobs: Logprobs = Field(
        "temperature",
        description="Distribution of the log-probabilities: temperature: after temperature and before truncation, at "
        "temperatures other than 1 of a vLLM with --logprobs-mode processed_logprobs; raw: the model's own.",
    )

    @property
    def logprobs_given(self) -> Logprobs:
        """As the config says."""
        return self.logprobs

    @property
    def gives_untruncated(self) -> bool:
        """A chat has no log-probabilities that could be wrong."""
        return self.gives_text_alone

    @property
    def gives_text_alone(self) -> bool:
        """A chat has no token ids."""
        return self.dialect == "chat"
