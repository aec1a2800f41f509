"""What a config says of a scripted engine."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from orchestrator.engines.spec import EngineName, EngineSpec, InFlight
from orchestrator.schema.fields import Count, NonNegative, NonNegativeSeconds, Probability, problem

from .engine import ScriptedEngine

__all__ = ["ScriptedSpec"]


class ScriptedSpec(EngineSpec):
    """An engine that computes nothing: for rehearsals and tests, with faults on demand."""

    adapter = ScriptedEngine

    kind: Literal["scripted"] = Field(
        description="scripted: invented responses, at a chosen speed and with chosen faults."
    )
    seed: NonNegative = Field(0, description="Seed of the responses and faults.")
    tokens_per_s: Annotated[float, Field(gt=0)] = Field(100.0, description="Tokens per second of one request.")
    first_token_s: NonNegativeSeconds = Field(0.02, description="Seconds until the first token.")
    length: Annotated[tuple[Count, Count], Field(strict=False)] | None = Field(
        None, description="[shortest, longest] response in tokens, drawn uniformly; null: always max_new_tokens."
    )
    tail_sigma: Annotated[float, Field(ge=0, le=10)] | None = Field(
        None,
        description="Width of a long tail: lengths are lognormal around the middle of length, or half of "
        "max_new_tokens; null: no tail.",
    )
    failure_rate: Probability = Field(0.0, description="Share of requests that fail like a 503 answer.")
    reset_rate: Probability = Field(0.0, description="Share of requests whose connection breaks half way.")
    hang_rate: Probability = Field(0.0, description="Share of requests that stop half way and never end.")
    reject_rate: Probability = Field(0.0, description="Share of requests that fail like a 400 answer.")
    delay_s: NonNegativeSeconds = Field(0.0, description="Seconds added before every answer.")
    time_scale: Annotated[float, Field(ge=0)] = Field(1.0, description="Factor on all times; 0: no waiting.")
    echo_rate: Probability = Field(
        0.0, description="Share of responses that answer the prompt: the sum of 12+30=, else its last word."
    )
    max_in_flight: InFlight = Field(64, description="Requests at a time.")
    name: EngineName | None = Field(None, description="Unique name in logs and status; null: scripted-POSITION.")

    @model_validator(mode="after")
    def _can_be_done(self) -> ScriptedSpec:
        if self.length is not None and self.length[0] > self.length[1]:
            raise problem(f"length is {list(self.length)}", "write [shortest, longest]")
        if self.fault_share > 1:
            raise problem(
                f"the four fault rates add up to {self.fault_share:g}",
                "they are shares of all requests, so use a sum of at most 1",
            )
        return self

    @property
    def gives_untruncated(self) -> bool:
        """They are invented."""
        return True

    @property
    def fault_share(self) -> float:
        """The four rates together."""
        return self.failure_rate + self.reset_rate + self.hang_rate + self.reject_rate
