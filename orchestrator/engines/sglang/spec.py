"""What a config says of a SGLang server."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from orchestrator.engines.spec import KEY_VARIABLE, EngineName, InFlight, KeyVariable, Logprobs, ServerSpec
from orchestrator.schema.fields import ServerUrl

from .engine import SGLangEngine

__all__ = ["SGLangSpec"]


class SGLangSpec(ServerSpec):
    """A SGLang server that runs somewhere already."""

    adapter = SGLangEngine

    kind: Literal["sglang"] = Field(description="sglang: a running SGLang server.")
    url: ServerUrl = Field(description="http://HOST:PORT of the server; not of a router.")
    api_key_env: KeyVariable = Field(None, description=KEY_VARIABLE)
    max_in_flight: InFlight = Field(256, description="Requests at a time; the server queues what it does not run.")
    name: EngineName | None = Field(None, description="Unique name in logs and status; null: host:port.")
    logprobs: Logprobs = Field(
        "temperature",
        description="Distribution of the log-probabilities: temperature: after temperature and before truncation; "
        "raw: the model's own, of a server that runs with SGLANG_RETURN_ORIGINAL_LOGPROB=1.",
    )

    @property
    def logprobs_given(self) -> Logprobs:
        """As the config says."""
        return self.logprobs

    @property
    def gives_untruncated(self) -> bool:
        """The server takes them before it truncates."""
        return True
