"""From a config to the values that components take: the one translation, used at the start and at every reload.

Invariants:

* Nothing else in the daemon picks keys out of a config for a component. A key of the config is in
  :class:`LiveSettings` or in :class:`StartSettings`; a test changes each and fails where neither notices.
* :class:`LiveSettings` is what a reload takes over, :class:`StartSettings` what a daemon takes when it starts and keeps
  (``config.differences.FIXED``). A component is given its own part of either and never the whole.
* Values are compared: two configs with equal settings are the same to a component.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from orchestrator.config import (
    Config,
    engine_as_json,
    sampling_header,
    sampling_params,
    sink_options,
)
from orchestrator.core.mixture.mixer import MixerSettings
from orchestrator.core.weights.forms import Weight, parse_weight
from orchestrator.engines import PoolSettings
from orchestrator.production.local_runner import GroupSettings
from orchestrator.prompts.spec import PromptSpec
from orchestrator.rewards.spec import RewardSpec

__all__ = [
    "LiveSettings",
    "RunFigures",
    "SourceSettings",
    "StartSettings",
    "engine_options",
    "live_settings",
    "parse_weights",
    "source_settings",
    "start_settings",
]


# -- what a reload takes over ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceSettings:
    """What one source's pipeline is built from; as long as it is equal the source goes on undisturbed.

    ``prompts`` and ``reward`` are what the config says of them, which they are opened and built from; ``seed`` is the
    run's, of the order of prompts; ``mask_offpolicy``: mask the tokens that are older than the version of a sample's
    last token; ``filter`` names the filter of finished groups; ``batch_size`` is in groups, and is what filters of the
    user's are told.
    """

    prompts: PromptSpec
    reward: RewardSpec
    seed: int
    groups: GroupSettings
    mask_offpolicy: bool
    n_samples: int
    filter: str | None
    batch_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFigures:
    """What a status says of the config: batches until the end (``None``: never), groups a batch, samples a group."""

    name: str
    num_rollout: int | None
    rollout_batch_size: int
    n_samples_per_prompt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveSettings:
    """What a reload takes over.

    ``weights`` and ``caps`` are as the file writes them, one for each source in the order of ``sources``;
    ``renamed_from`` are the earlier names of those that had one; ``engines`` are the options of each, as JSON with its
    name.
    """

    mixer: MixerSettings
    weights: Mapping[str, float | str]
    caps: Mapping[str, float | str | None]
    sources: Mapping[str, SourceSettings]
    renamed_from: Mapping[str, str]
    engines: tuple[Mapping[str, Any], ...]
    figures: RunFigures


def live_settings(config: Config) -> LiveSettings:
    """What a daemon with this config in force works with, as far as a reload can change it."""
    names = config.source_names
    caps = config.data_source_reward_caps or (None,) * len(names)
    return LiveSettings(
        mixer=_mixer(config),
        weights=dict(zip(names, config.data_source_weights, strict=True)),
        caps=dict(zip(names, caps, strict=True)),
        sources={name: source_settings(config, name) for name in names},
        renamed_from={s.name: s.renamed_from for s in config.data_sources if s.renamed_from is not None},
        engines=tuple(engine_options(config)),
        figures=RunFigures(
            name=config.run.name,
            num_rollout=config.rollout.num_rollout,
            rollout_batch_size=config.rollout.rollout_batch_size,
            n_samples_per_prompt=config.rollout.n_samples_per_prompt,
        ),
    )


def source_settings(config: Config, name: str) -> SourceSettings:
    """Those of one source; ``KeyError`` if there is none of that name."""
    source, sampling, rollout = config.source(name), config.sampling_of(name), config.rollout
    return SourceSettings(
        prompts=source.prompts,
        reward=source.reward,
        seed=config.run.seed,
        groups=GroupSettings(
            sampling=sampling_params(sampling, seed=config.run.seed),
            sampling_header=sampling_header(sampling),
            replace_failed=rollout.failed_sample == "replace",
            max_staleness=rollout.max_staleness,
            logprobs_kind=config.logprobs_kind,
        ),
        mask_offpolicy=rollout.mask_offpolicy_in_partial_rollout,
        n_samples=rollout.n_samples_per_prompt,
        filter=config.dynamic_sampling_filter,
        batch_size=rollout.rollout_batch_size,
    )


def engine_options(config: Config) -> list[dict[str, Any]]:
    """What the config says of each engine, as JSON with its name."""
    return [engine_as_json(engine) for engine in config.engines]


def parse_weights(weights: Iterable[float | str], *, directory: Path) -> list[Weight]:
    """Weights as the table takes them; dotted paths are looked up in ``directory`` first.

    Raises:
        ExpressionError, DottedPathError, WeightError: one of them cannot be used.
    """
    return [parse_weight(weight, directory=directory) for weight in weights]


def _mixer(config: Config) -> MixerSettings:
    rollout = config.rollout
    return MixerSettings(
        batch_size=rollout.rollout_batch_size,
        lookahead=rollout.lookahead,
        max_staleness=rollout.max_staleness,
        num_rollout=rollout.num_rollout,
        outstanding_bound=config.outstanding_bound,
        buffer_bounds={source.name: (source.buffer.groups, source.buffer.bytes) for source in config.data_sources},
    )


# -- what a daemon takes when it starts --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StarvationSettings:
    """What happens when a batch waits for one source; see :class:`~orchestrator.consumer.starvation.Starvation`."""

    policy: Literal["wait", "borrow"]
    patience_s: float


@dataclass(frozen=True, slots=True)
class TokenizerSettings:
    """The run's own tokenizer; see :meth:`~orchestrator.tokenizer.PromptTokenizer.open`."""

    path: Path
    chat_template: str | None
    add_generation_prompt: bool


@dataclass(frozen=True, slots=True)
class ArchiveSettings:
    """Where acknowledged groups are kept; see :class:`~orchestrator.archive.Archiver`."""

    directory: Path
    format: Literal["jsonl", "parquet"]
    keep: int | None


@dataclass(frozen=True, slots=True)
class SocketSettings:
    """Where the trainer connects; see :class:`~orchestrator.consumer.ConsumerServer`."""

    path: Path
    max_connections: int
    allow_uids: frozenset[int] | None


@dataclass(frozen=True, slots=True)
class FigureSettings:
    """Where the figures of each step go; see :func:`~orchestrator.sinks.build_feeds`.

    ``file``: bytes and number of older files of ``metrics.jsonl``; ``None``: it is not written.
    """

    sinks: tuple[Mapping[str, Any], ...]
    file: tuple[int, int] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StartSettings:
    """What a daemon takes when it starts and keeps; ``status_http``: ``host:port`` of the page, ``None``: off."""

    run_name: str
    state_dir: Path
    keep_checkpoints: int | None
    pool: PoolSettings
    starvation: StarvationSettings
    tokenizer: TokenizerSettings | None
    archive: ArchiveSettings | None
    socket: SocketSettings
    status_http: str | None
    figures: FigureSettings


def start_settings(config: Config) -> StartSettings:
    """What a daemon that starts with this config works with until it ends."""
    run, tokenizer, archive, metrics = config.run, config.tokenizer, config.archive, config.metrics
    uids = config.consumer.allow_uids
    return StartSettings(
        run_name=run.name,
        state_dir=run.state_dir,
        keep_checkpoints=run.keep_checkpoints,
        pool=_pool(config),
        starvation=StarvationSettings(config.rollout.starvation.policy, config.rollout.starvation.patience_s),
        tokenizer=None
        if tokenizer is None
        else TokenizerSettings(tokenizer.path, tokenizer.chat_template, tokenizer.add_generation_prompt),
        archive=None if archive is None else ArchiveSettings(archive.path, archive.format, archive.keep),
        socket=SocketSettings(
            config.consumer.socket, config.consumer.max_connections, None if uids is None else frozenset(uids)
        ),
        status_http=config.status.http,
        figures=FigureSettings(
            tuple(sink_options(sink) for sink in metrics.sinks),
            (metrics.max_bytes, metrics.keep) if metrics.jsonl else None,
        ),
    )


def _pool(config: Config) -> PoolSettings:
    return PoolSettings(
        request_timeout_s=config.engine_defaults.request_timeout_s,
        stall_s=config.engine_defaults.stall_s,
        max_retries=config.engine_defaults.max_retries,
        chunk_tokens=config.rollout.chunk_tokens,
        keep_partials=config.rollout.partial_rollout,
        seed=config.run.seed,
    )
