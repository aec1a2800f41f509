"""The sources of a config file: their prompts, their rewards, their buffers.

Invariants:

* A key that does not go with the others is an error, never ignored: what is for files at a task, what is for functions
  at a server.
* A source of a task of reasoning-gym without a reward is scored by that task; any other by ``exact_match``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue, ValidationInfo, model_validator
from pydantic import WithJsonSchema as Schema

from orchestrator.prompts import task_of
from orchestrator.rewards import BUILT_IN_REWARDS, PACKAGE_REWARDS

from .fields import (
    Bytes,
    Count,
    Seconds,
    Section,
    SourceName,
    absolute_path,
    as_written,
    is_dotted_path,
    nearest,
    problem,
    subsection,
)
from .sections import Sampling

__all__ = ["Buffer", "PromptPath", "Prompts", "RewardField", "RewardSpec", "Source", "prompt_options", "reward_options"]

DEFAULT_BUFFER_BYTES: Final = 1 << 30
"""1 GiB: 250 batches of 32 groups of 8 samples of 1,280 tokens."""

REWARD_NAMES: Final = (*BUILT_IN_REWARDS, *PACKAGE_REWARDS)


# -- prompts ----------------------------------------------------------------------------------------------------------


def _prompt_path(value: Any, info: ValidationInfo) -> Any:
    task = task_of(value) if isinstance(value, str) else None
    if task is None:
        return absolute_path(value, info)
    if re.fullmatch(r"\w+", task) is None:
        raise problem(f"{value!r} names no task", "write reasoning_gym:TASK, such as reasoning_gym:chain_sum")
    return value


PromptPath = Annotated[
    Path | str, BeforeValidator(_prompt_path, json_schema_input_type=str), Schema({"type": "string"})
]
"""A path as ``FilePath``, or ``reasoning_gym:TASK``."""

FILE_KEYS: Final = ("input_key", "label_key", "metadata_key", "max_new_tokens_key")
TASK_KEYS: Final = ("size", "seed", "options")


class Prompts(Section):
    """Where a source's prompts come from."""

    path: PromptPath = Field(
        description="File of prompts, .jsonl or .parquet, relative to the config file; or reasoning_gym:TASK."
    )
    input_key: Annotated[str, Field(min_length=1)] = Field(
        "prompt", description="Key of a row that holds the prompt: text, chat messages, or token ids."
    )
    label_key: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="Key of a row that holds the label; null: label, where a row has it."
    )
    metadata_key: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="Key of a row that holds an object of metadata; null: metadata, where a row has it."
    )
    max_new_tokens_key: Annotated[str, Field(min_length=1)] | None = Field(
        None,
        description="Key of a row that holds the longest response to it in tokens, where that is less than "
        "sampling.max_new_tokens; null: rows have none.",
    )
    shuffle: bool = Field(True, description="A new order in every epoch, a function of the seed; false: file order.")
    epochs: Count | None = Field(None, description="How often the prompts are gone through; null: for ever.")
    size: Annotated[int, Field(ge=1, le=1 << 32)] | None = Field(
        None, description="Tasks only: number of prompts in an epoch; null: 10000."
    )
    seed: Annotated[int, Field(ge=0, lt=1 << 32)] | None = Field(
        None, description="Tasks only: what the prompts are drawn by; null: run.seed."
    )
    options: dict[str, JsonValue] = Field({}, description="Tasks only: the task's own parameters, such as min_terms.")

    @model_validator(mode="after")
    def _keys_go_with_the_path(self) -> Prompts:
        is_task = task_of(self.path) is not None
        wrong = [key for key in (FILE_KEYS if is_task else TASK_KEYS) if key in self.model_fields_set]
        if wrong and is_task:
            raise problem(f"{', '.join(wrong)}: for files of prompts; {self.path} has none", "leave it out")
        if wrong:
            raise problem(f"{', '.join(wrong)}: for tasks (path: reasoning_gym:TASK), not for files", "leave it out")
        return self


def prompt_options(source: Source, *, seed: int) -> dict[str, Any]:
    """What ``open_prompts`` takes, for a run of that seed."""
    values = {key: getattr(source.prompts, key) for key in Prompts.model_fields}
    return values | {"name": source.name, "task_seed": values["seed"], "seed": seed}


# -- rewards ----------------------------------------------------------------------------------------------------------


def _endpoint_url(value: str) -> str:
    right = 'write "http://HOST:PORT/PATH"'
    try:
        parts = urlsplit(value)
        port = parts.port
    except ValueError as error:
        raise problem(f"{value!r} is no URL: {error}", right) from error
    if parts.scheme not in ("http", "https") or not parts.hostname or re.search(r"\s", value) or port == 0:
        raise problem(f"{value!r} is not the URL of a server", right)
    if parts.username is not None or parts.password is not None:
        raise problem("a URL with a user name or password would show them in logs", f"{right}, and use api_key_env")
    if parts.fragment:
        raise problem(f"{value!r} has a fragment, which no server sees", right)
    return value


EndpointUrl = Annotated[str, AfterValidator(_endpoint_url)]


class RewardSpec(Section):
    """What scores a source's responses."""

    kind: Literal["function", "http"] = Field(
        "function", description="function: a built-in reward or a function, by its path; http: a server, by its url."
    )
    path: str | None = Field(
        None,
        description=f"A built-in reward ({', '.join(REWARD_NAMES)}) or the dotted path of a function "
        "(sample, prompt), relative to the working directory.",
    )
    url: EndpointUrl | None = Field(
        None, description="http only: where requests are posted, such as http://gpu-7:9000/score."
    )
    key: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="Entry of a returned dictionary that is the reward; null: a number is returned."
    )
    timeout_s: Seconds = Field(30.0, description="Seconds that one call may take.")
    concurrency: Annotated[int, Field(ge=1, le=1024)] = Field(
        16, description="Calls at a time; for a synchronous function also the number of its processes."
    )
    group: bool = Field(
        False, description="Score all samples of a group in one call: a function (samples, prompt) that returns a list."
    )
    api_key_env: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="http only: environment variable that holds the server's key; null: none is needed."
    )

    @model_validator(mode="after")
    def _keys_go_with_the_kind(self) -> RewardSpec:
        if self.kind == "http":
            _check_server(self)
        else:
            _check_function(self)
        return self

    @property
    def name(self) -> str:
        """What is called: the path or the address."""
        return self.url or self.path or ""


def _check_server(spec: RewardSpec) -> None:
    if spec.url is None:
        raise problem("a reward of kind http needs a url", "url: http://HOST:PORT/PATH")
    if spec.path is not None:
        raise problem("path is for functions, a reward of kind http has none", "leave path out, or kind")


def _check_function(spec: RewardSpec) -> None:
    for key in ("url", "api_key_env"):
        if getattr(spec, key) is not None:
            raise problem(f"{key} is for servers", "write kind: http")
    if spec.path is None:
        raise problem("nothing says what scores", f"path: one of {', '.join(REWARD_NAMES)}, or package.module.f")
    if spec.path in REWARD_NAMES:
        if spec.key is not None:
            raise problem(
                f"key {spec.key!r} is given, but {spec.path} returns a number",
                "a key is for functions that return a dictionary",
            )
        if spec.group:
            raise problem(
                f"group: true is given, but {spec.path} scores each sample by itself",
                "group is for functions of all samples of a group",
            )
    elif not is_dotted_path(spec.path):
        near = nearest(spec.path, REWARD_NAMES)
        raise problem(
            f"{spec.path!r} is neither a built-in reward nor a dotted path",
            f"did you mean {near}?" if near else _known(REWARD_NAMES),
        )


def _known(names: Iterable[str]) -> str:
    return f"built-in are {', '.join(names)}; or package.module.f"


def reward_options(spec: RewardSpec) -> dict[str, Any]:
    """What ``build_reward`` takes."""
    return {key: getattr(spec, key) for key in RewardSpec.model_fields}


def _as_spec(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


RewardField = Annotated[RewardSpec, BeforeValidator(_as_spec, json_schema_input_type=str | RewardSpec)]
"""A reward's path alone, or a mapping with its options."""


# -- sources ----------------------------------------------------------------------------------------------------------


class Buffer(Section):
    """Bounds of one source's buffer of finished groups; they act when a generation would be launched."""

    groups: Count | None = Field(None, description="Groups in flight and buffered; null: bounded by the plan alone.")
    bytes: Bytes = Field(DEFAULT_BUFFER_BYTES, description="Bytes of finished groups held in memory.")


class Source(Section):
    """One source of prompts."""

    name: SourceName = Field(description="Unique name, part of metric names: rollout/{name}/weight.")
    prompts: Prompts = Field(description="Where the prompts come from.")
    reward: RewardField = as_written(
        "exact_match", "What scores the responses; left out at a source reasoning_gym:TASK: that task."
    )
    sampling: Sampling | None = Field(None, description="Laid over the general sampling; keys left out keep its value.")
    buffer: Buffer = subsection("Bounds of this source's buffer.")
    renamed_from: SourceName | None = Field(
        None, description="Name under which it ran before, for a start with --allow-source-changes."
    )

    @model_validator(mode="before")
    @classmethod
    def _tasks_score_themselves(cls, value: Any) -> Any:
        if not isinstance(value, dict) or "reward" in value:
            return value
        prompts = value.get("prompts")
        path = prompts.get("path") if isinstance(prompts, dict) else getattr(prompts, "path", None)
        return value | {"reward": "reasoning_gym"} if isinstance(path, str) and task_of(path) is not None else value
