"""The whole config: as a file may write it, in two forms, and as the daemon reads it, in one.

Invariants:

* :class:`ConfigFile` is what the JSON Schema describes: the form with ``data_sources`` and the flat form.
* :class:`Config` has ``data_sources`` whichever form the file has; nothing behind the loading knows of the flat form.
* Every engine of a :class:`Config` has a name, and every value has been validated once, in the file's own form.
"""

from __future__ import annotations

from typing import Annotated, Any, Final

from pydantic import BeforeValidator, Field, ValidationError
from pydantic_core import InitErrorDetails

from orchestrator.core.filters import BUILT_IN_FILTERS
from orchestrator.engines.kinds import AnyEngine, named
from orchestrator.engines.port import SamplingParams
from orchestrator.engines.spec import Logprobs
from orchestrator.prompts.kinds import AnyPath
from orchestrator.rewards.kinds import AnyReward
from orchestrator.schema.fields import (
    Count,
    NonNegative,
    Section,
    SourceName,
    WeightText,
    is_dotted_path,
    list_of,
    nearest,
    problem,
    subsection,
)

from .metrics import Metrics
from .sections import Archive, Consumer, EngineDefaults, Logging, Rollout, Run, Sampling, Status, Tokenizer
from .sources import Source
from .text import Location

__all__ = ["FLAT_HOMES", "Config", "ConfigFile", "normalise", "sampling_header", "sampling_params"]

FLAT_HOMES: Final[dict[str, str]] = {
    "prompt_data": "data_sources[…].prompts.path",
    "prompt_data_source_names": "data_sources[…].name",
    "reward": "data_sources[…].reward",
    "input_key": "data_sources[…].prompts.input_key",
    "label_key": "data_sources[…].prompts.label_key",
    "metadata_key": "data_sources[…].prompts.metadata_key",
    "rollout_shuffle": "data_sources[…].prompts.shuffle",
    "rollout_seed": "run.seed",
    "rollout_batch_size": "rollout.rollout_batch_size",
    "n_samples_per_prompt": "rollout.n_samples_per_prompt",
    "num_rollout": "rollout.num_rollout",
    "over_sampling_batch_size": "rollout.over_sampling_batch_size",
}
"""The keys of the flat form, and where each stands in the other."""


def _filter_name(value: Any) -> Any:
    if isinstance(value, str) and value not in BUILT_IN_FILTERS and not is_dotted_path(value):
        near = nearest(value, BUILT_IN_FILTERS)
        raise problem(
            f"{value!r} is neither a built-in filter nor a dotted path",
            f"did you mean {near}?"
            if near
            else f"built-in: {', '.join(BUILT_IN_FILTERS)}; or package.module.f, or null",
        )
    return value


class Common(Section):
    """The keys that both forms share."""

    run: Run = subsection("Name and seed of the run, and where its state is stored.")
    rollout: Rollout = subsection("How batches are formed.")
    engine_defaults: EngineDefaults = subsection("Deadlines and retries for all engines.")
    tokenizer: Tokenizer | None = Field(
        None, description="Tokenising in the daemon; needed for chat prompts on engines without a template endpoint."
    )
    archive: Archive | None = Field(None, description="Archive of acknowledged groups; null: none.")
    sampling: Sampling = subsection("How tokens are sampled.")
    engines: Annotated[tuple[AnyEngine, ...], list_of("engines", "[{kind: scripted}]", least=1)] = Field(
        strict=False, json_schema_extra={"minItems": 1}, description="The inference servers."
    )
    data_source_weights: Annotated[
        tuple[WeightText, ...], list_of("one weight for each source, in the same order", "[0.3, 0.7]")
    ] = Field(
        strict=False,
        description='One weight for each source, in the same order: a number, "lambda step: …", or a dotted path. '
        "Normalised to sum to 1.",
    )
    data_source_reward_caps: (
        Annotated[tuple[WeightText | None, ...], list_of("one cap for each source, in the same order", "[null, 0.9]")]
        | None
    ) = Field(
        None,
        strict=False,
        description="One cap for each source, in the same order, written like a weight, or null for none. Groups whose "
        "mean "
        "reward is above the cap are dropped and counted.",
    )
    dynamic_sampling_filter: Annotated[str | None, BeforeValidator(_filter_name)] = Field(
        None,
        description=f"Filter of finished groups: {', '.join(BUILT_IN_FILTERS)}, the dotted path of a function, or "
        "null: none.",
    )
    consumer: Consumer = subsection("The socket that the trainer takes its batches from.")
    status: Status = subsection("The status page, health check and metrics over HTTP.")
    logging: Logging = subsection("Where the log is written.")
    metrics: Metrics = subsection("Where the metrics of each step are written besides the log.")


class Config(Common):
    """A config in force: checked wholly, with absolute paths."""

    data_sources: tuple[Source, ...]

    @property
    def source_names(self) -> tuple[str, ...]:
        """The names of the sources, in their order."""
        return tuple(source.name for source in self.data_sources)

    def source(self, name: str) -> Source:
        """The source of that name; ``KeyError`` if there is none."""
        return {source.name: source for source in self.data_sources}[name]

    def sampling_of(self, source: str) -> Sampling:
        """How responses of that source are drawn: its own ``sampling`` laid over the general one."""
        own = self.source(source).sampling
        given = {key: getattr(own, key) for key in own.model_fields_set} if own is not None else {}
        return self.sampling.model_copy(update=given)

    @property
    def outstanding_bound(self) -> int:
        """Groups in flight and buffered over all sources: ``over_sampling_batch_size``, else four times the plan."""
        rollout = self.rollout
        return rollout.over_sampling_batch_size or 4 * rollout.lookahead * rollout.rollout_batch_size

    @property
    def logprobs_kind(self) -> Logprobs:
        """The distribution that log-probabilities are of; where temperatures differ from 1 all engines agree."""
        return "raw" if any(engine.logprobs_given == "raw" for engine in self.engines) else "temperature"


def sampling_params(sampling: Sampling, *, seed: int | None = None) -> SamplingParams:
    """The section as the engines' port knows it; ``seed`` stands in where the section has none."""
    values = {key: getattr(sampling, key) for key in Sampling.model_fields}
    return SamplingParams(**values | {"seed": seed if sampling.seed is None else sampling.seed})


def sampling_header(sampling: Sampling) -> dict[str, Any]:
    """The section as JSON, for the header of a group."""
    return sampling.model_dump(mode="json")


class ConfigFile(Common):
    """Configuration of the rollout orchestrator."""

    data_sources: (
        Annotated[tuple[Source, ...], list_of("sources", "[{name: …, prompts: {path: …}}]", least=1)] | None
    ) = Field(
        None,
        strict=False,
        json_schema_extra={"minItems": 1},
        description="The sources of prompts. Not together with prompt_data.",
    )
    prompt_data: Annotated[tuple[AnyPath, ...], list_of("one file for each source", "[a.jsonl]", least=1)] | None = (
        Field(
            None,
            strict=False,
            json_schema_extra={"minItems": 1},
            description="Flat form: one file of prompts for each source.",
        )
    )
    prompt_data_source_names: Annotated[tuple[SourceName, ...], list_of("one name for each file", "[a]")] | None = (
        Field(None, strict=False, description="Flat form: one name for each file of prompt_data, in the same order.")
    )
    reward: AnyReward | None = Field(None, description="Flat form: the reward of all sources.")
    input_key: str | None = Field(None, min_length=1, description="Flat form: prompts.input_key of all sources.")
    label_key: str | None = Field(None, min_length=1, description="Flat form: prompts.label_key of all sources.")
    metadata_key: str | None = Field(None, min_length=1, description="Flat form: prompts.metadata_key of all sources.")
    rollout_shuffle: bool | None = Field(None, description="Flat form: prompts.shuffle of all sources.")
    rollout_seed: NonNegative | None = Field(None, description="Flat form: run.seed.")
    rollout_batch_size: Count | None = Field(None, description="Flat form: rollout.rollout_batch_size, in groups.")
    n_samples_per_prompt: Count | None = Field(None, description="Flat form: rollout.n_samples_per_prompt.")
    num_rollout: Count | None = Field(None, description="Flat form: rollout.num_rollout, in batches.")
    over_sampling_batch_size: Count | None = Field(
        None, description="Flat form: rollout.over_sampling_batch_size, in groups."
    )


def normalise(file: ConfigFile) -> tuple[Config, dict[Location, Location]]:
    """The one form, and where the file has what it moved: ``{place in Config: place in the file}``.

    The caller has made sure that the file has one of the two forms, whole.

    Raises:
        ValidationError: a key of the flat form does not go with the prompts of one of the sources.
    """
    common: dict[str, Any] = {key: getattr(file, key) for key in Common.model_fields}
    common["engines"] = named(file.engines)
    origins: dict[Location, Location] = {}
    for section, keys in {
        "run": {"seed": "rollout_seed"},
        "rollout": {key: key for key in FLAT_HOMES if FLAT_HOMES[key] == f"rollout.{key}"},
    }.items():
        moved = {key: flat for key, flat in keys.items() if getattr(file, flat) is not None}
        values = {key: getattr(file, flat) for key, flat in moved.items()}
        common[section] = common[section].model_copy(update=values)
        origins.update({(section, key): (flat,) for key, flat in moved.items()})
    if file.data_sources is not None:
        sources = file.data_sources
    else:
        sources = _flat_sources(file)
        for index in range(len(sources)):
            origins[("data_sources", index)] = ("prompt_data", index)
            origins[("data_sources", index, "name")] = ("prompt_data_source_names", index)
            origins[("data_sources", index, "reward")] = ("reward",)
            origins[("data_sources", index, "prompts", "path")] = ("prompt_data", index)
    return Config.model_construct(data_sources=sources, **common), origins


def _flat_sources(file: ConfigFile) -> tuple[Source, ...]:
    keys = {
        "input_key": "input_key",
        "label_key": "label_key",
        "metadata_key": "metadata_key",
        "shuffle": "rollout_shuffle",
    }
    options = {key: value for key, flat in keys.items() if (value := getattr(file, flat)) is not None}
    reward: dict[str, Any] = {} if file.reward is None else {"reward": file.reward}
    pairs = zip(file.prompt_data or (), file.prompt_data_source_names or (), strict=True)
    return tuple(
        _flat_source({"name": name, "prompts": {"path": path, **options}, **reward}, index)
        for index, (path, name) in enumerate(pairs)
    )


def _flat_source(values: dict[str, Any], index: int) -> Source:
    """One source of the flat form; what is wrong with it is said of its entry in ``prompt_data``."""
    try:
        return Source.model_validate(values)
    except ValidationError as error:
        said = error.errors()[0]["ctx"]
        wrong = InitErrorDetails(type=problem(said["message"], said["hint"]), loc=("prompt_data", index), input=values)
        raise ValidationError.from_exception_data("prompt_data", [wrong]) from None
