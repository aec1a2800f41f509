"""What a config says of a llama.cpp server that the daemon starts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from orchestrator.engines.port import Engine
from orchestrator.engines.spec import EngineName, EngineSpec, InFlight, Logprobs
from orchestrator.schema.fields import Count, FilePath

from .engine import EmbeddedEngine

__all__ = ["EmbeddedSpec"]


class EmbeddedSpec(EngineSpec):
    """A llama.cpp server that the daemon starts as its child."""

    adapter = EmbeddedEngine

    kind: Literal["embedded"] = Field(description="embedded: a llama.cpp server that the daemon starts itself.")
    model: FilePath | None = Field(
        None,
        description="GGUF file of the model; null: a tiny random model, created at start. Relative to the config file.",
    )
    slots: Annotated[int, Field(ge=1, le=1024)] = Field(4, description="Generations that the server runs at once.")
    context_tokens: Count = Field(2048, description="Tokens of prompt and response together, for each slot.")
    threads: Annotated[int, Field(ge=1, le=1024)] = Field(2, description="Compute threads of the server.")
    max_in_flight: InFlight | None = Field(None, description="Requests at a time; null: one for each slot.")
    name: EngineName | None = Field(None, description="Unique name in logs and status; null: embedded-POSITION.")
    logprobs: Logprobs = Field(
        "temperature",
        description="Distribution of the log-probabilities: temperature: after temperature and before truncation; "
        "raw: the model's own.",
    )

    def build(self, *, workdir: Path) -> Engine:
        """The engine, which keeps its files in ``workdir``."""
        return EmbeddedEngine(**self.adapter_options(), workdir=workdir)

    @property
    def logprobs_given(self) -> Logprobs:
        """As the config says."""
        return self.logprobs

    @property
    def context_bound(self) -> int:
        """The server is started with it."""
        return self.context_tokens
