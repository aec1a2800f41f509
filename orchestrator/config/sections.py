"""The sections of a config file but engines and sources: names, defaults, bounds and units of every key.

Invariants:

* Each key's description is the one text of the JSON Schema, and names its unit; ``docs/configuration.md`` says the same
  at greater length.
* A section knows only itself; what two sections promise each other is proved in ``proofs.py``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, JsonValue, model_validator

from orchestrator.schema.fields import (
    Count,
    FilePath,
    HostPort,
    NonNegative,
    NonNegativeSeconds,
    Seconds,
    Section,
    SourceName,
    as_written,
    list_of,
    problem,
    subsection,
)

__all__ = [
    "Archive",
    "Consumer",
    "EngineDefaults",
    "Logging",
    "Rollout",
    "Run",
    "Sampling",
    "Starvation",
    "Status",
    "Tokenizer",
]


class Run(Section):
    """Name and seed of the run, and where its state is stored."""

    name: SourceName = Field("rollout", description="Name of the run in logs, metrics and the reply to clients.")
    seed: NonNegative = Field(
        0, description="Seed of the prompt order and of sampling; the same seed gives the same plan."
    )
    state_dir: FilePath = as_written(
        "state", "Directory of the run's state; created if missing. Relative to the config file."
    )
    keep_checkpoints: Count | None = Field(
        None, description="How many named checkpoints are kept, the newest ones; null: all."
    )


class Starvation(Section):
    """What happens when a batch waits for one source."""

    policy: Literal["wait", "borrow"] = Field(
        "wait",
        description="wait: the batch waits for the source it lacks. borrow: after patience_s other "
        "sources fill in and are paid back.",
    )
    patience_s: NonNegativeSeconds = Field(60.0, description="Seconds that a batch waits before other sources fill in.")


class Rollout(Section):
    """How batches are formed."""

    rollout_batch_size: Count = Field(32, description="Groups per batch.")
    n_samples_per_prompt: Count = Field(8, description="Samples per group: responses to one prompt.")
    num_rollout: Count | None = Field(None, description="End after this many batches; null: never.")
    over_sampling_batch_size: Count | None = Field(
        None,
        description="Most groups in flight and buffered, over all sources; null: four times the plan.",
    )
    lookahead: Annotated[int, Field(ge=1, le=1000)] = Field(
        2, description="Batches planned ahead, and how many batches may overtake a group."
    )
    max_staleness: NonNegative | None = Field(
        None, description="Most staleness in policy versions; older work is dropped and counted; null: no bound."
    )
    partial_rollout: bool = Field(True, description="Keep and continue generations that were interrupted.")
    mask_offpolicy_in_partial_rollout: bool = Field(
        False, description="Mask tokens of an older policy version than the last token of their sample."
    )
    starvation: Starvation = subsection("What happens when a batch waits for one source.")
    failed_sample: Literal["replace", "drop_group"] = Field(
        "replace",
        description="What happens to a sample with no retries left. replace: generate another. drop_group: drop its "
        "group.",
    )
    chunk_tokens: Count | None = Field(
        2048, description="Tokens per request, so that a failing engine loses at most these; null: the whole response."
    )


class EngineDefaults(Section):
    """Deadlines and retries for all engines."""

    request_timeout_s: Seconds = Field(600.0, description="Most seconds for one request to an engine.")
    stall_s: Seconds = Field(60.0, description="Seconds without a new token after which a request has stalled.")
    max_retries: Annotated[int, Field(ge=0, le=100)] = Field(
        3, description="Retries of a failed generation, which keep its tokens and use another engine if possible."
    )

    @model_validator(mode="after")
    def _stall_can_be_seen(self) -> EngineDefaults:
        if self.stall_s > self.request_timeout_s:
            raise problem(
                f"stall_s is {self.stall_s:g}, above request_timeout_s ({self.request_timeout_s:g}): a stall would "
                "never be detected",
                "use a stall_s of at most request_timeout_s",
            )
        return self


class Tokenizer(Section):
    """Tokenising here instead of in the engine."""

    path: FilePath = Field(description="Directory or file of the tokenizer. Relative to the config file.")
    chat_template: str | None = Field(None, description="Jinja text of the chat template; null: the tokenizer's own.")
    add_generation_prompt: bool = Field(
        True, description="End a chat prompt with the start of the assistant's message."
    )


class Archive(Section):
    """Acknowledged groups, kept for reading later."""

    path: FilePath = Field(description="Directory of the archive; created if missing. Relative to the config file.")
    format: Literal["jsonl", "parquet"] = Field("jsonl", description="Format of the archive's files.")
    keep: Count | None = Field(None, description="How many batches are kept; null: all.")


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


StopText = Annotated[str, Field(min_length=1)]


class Sampling(Section):
    """How tokens are drawn. The defaults truncate nothing."""

    max_new_tokens: Count = Field(1024, description="Most tokens in a response.")
    temperature: Annotated[float, Field(ge=0, le=100)] = Field(
        1.0, description="Sampling temperature; 0: always the most likely token."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="Sample from the most likely tokens that together have this probability; 1: off."
    )
    top_k: NonNegative = Field(0, description="Sample from this many of the most likely tokens; 0: off.")
    min_p: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="Sample from tokens at least this probable, relative to the most likely one; 0: off."
    )
    stop: Annotated[
        tuple[StopText, ...],
        list_of("stop strings", '["\\n\\n"]'),
        BeforeValidator(_as_list, json_schema_input_type=StopText | list[StopText]),  # runs before the one above
    ] = Field((), strict=False, description="A string, or a list of strings, that ends a response.")
    stop_token_ids: Annotated[tuple[Annotated[int, Field(ge=0, lt=1 << 31)], ...], list_of("token ids", "[2]")] = Field(
        (), strict=False, description="Token ids that end a response."
    )
    seed: NonNegative | None = Field(
        None, description="Seed of sampling, if the engine supports it; each sample derives its own. null: run.seed."
    )
    chat_template_kwargs: dict[str, JsonValue] = Field(
        {}, description="Arguments of the model's chat template, such as enable_thinking."
    )


class Consumer(Section):
    """The socket that the trainer takes its batches from."""

    socket: FilePath = as_written(
        "run/orchestrator.sock",
        "Unix socket, at most 107 bytes as an absolute path. Relative to the config file.",
    )
    max_connections: Annotated[int, Field(ge=1, le=65_536)] = Field(
        1024, description="Most connections at a time, of trainer ranks and command line together."
    )
    allow_uids: Annotated[list[Annotated[int, Field(ge=0, lt=2**32 - 1)]], Field(min_length=1)] | None = Field(
        None, description="User ids whose processes may connect; null: the daemon's own and root."
    )


class Status(Section):
    """The status page, health check and metrics over HTTP."""

    http: HostPort | None = Field("127.0.0.1:8642", description="host:port of the HTTP page and metrics; null: off.")


class Logging(Section):
    """Where the log is written."""

    file: FilePath | None = Field(
        None, description="File of JSON log lines; null: standard output. Relative to the config file."
    )
    level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe level that is written."
    )
