"""What a config says of a llama.cpp server."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from orchestrator.engines.spec import KEY_VARIABLE, EngineName, InFlight, KeyVariable, Logprobs, ServerSpec
from orchestrator.schema.fields import ServerUrl

from .engine import LlamaCppEngine

__all__ = ["LlamaCppSpec"]


class LlamaCppSpec(ServerSpec):
    """A llama.cpp server that runs somewhere already."""

    adapter = LlamaCppEngine

    kind: Literal["llamacpp"] = Field(description="llamacpp: a running llama.cpp server.")
    url: ServerUrl = Field(description="http://HOST:PORT of the server.")
    api_key_env: KeyVariable = Field(None, description=KEY_VARIABLE)
    max_in_flight: InFlight = Field(16, description="Requests at a time; use the server's number of slots.")
    name: EngineName | None = Field(None, description="Unique name in logs and status; null: host:port.")
    logprobs: Logprobs = Field(
        "temperature",
        description="Distribution of the log-probabilities: temperature: after temperature and before truncation; "
        "raw: the model's own.",
    )

    @property
    def logprobs_given(self) -> Logprobs:
        """As the config says."""
        return self.logprobs
