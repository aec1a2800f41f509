"""Reads slime's ``args`` once into plain values.

Invariants:

* All problems are raised as one :class:`~orchestrator.errors.ConfigError` (a ``ValueError``) that names every option
  concerned and what would be right.
* An option that is missing in ``args`` has slime's own default.
* A setting that would be ignored is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from orchestrator.core.dotted import resolve
from orchestrator.core.filters import RewardCaps
from orchestrator.core.weights.forms import Weight, parse_weight
from orchestrator.core.weights.table import WeightTable
from orchestrator.errors import (
    ConfigError,
    ConfigProblem,
    DottedPathError,
    ExpressionError,
    FilterError,
    OrchestratorError,
    WeightError,
)

__all__ = [
    "BATCHES_FORMED",
    "Options",
    "PromptOptions",
    "read_options",
    "read_reward_caps",
    "read_weights",
    "split_rows",
]

BATCHES_FORMED: Final = "data_source_batches_formed"
"""Attribute of ``args`` by which the log function tells the data source how many batches slime has formed. ``args`` is
the only object that slime passes to both."""

SOURCE_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
"""Names become parts of metric names. The daemon's config has the same rule."""

_PATH_OF_ROWS: Final = re.compile(r"(?P<file>.*)@\[(?P<begin>-?\d*):(?P<end>-?\d*)\]")


@dataclass(frozen=True, slots=True)
class PromptOptions:
    """How rows of prompt files are read, with slime's names and defaults.

    Prompts longer than ``max_prompt_tokens`` are left out (``None``: no limit).
    """

    input_key: str = "input"
    label_key: str | None = None
    metadata_key: str | None = "metadata"
    tool_key: str | None = "tools"
    apply_chat_template: bool = False
    apply_chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    max_prompt_tokens: int | None = None
    hf_checkpoint: str | None = None


@dataclass(frozen=True, slots=True)
class Options:
    """What the data source needs from ``args``; ``names``, ``paths`` and the table's weights have the same order."""

    names: tuple[str, ...]
    paths: tuple[str, ...]
    table: WeightTable
    prompts: PromptOptions
    rollout_batch_size: int
    n_samples_per_prompt: int
    shuffle: bool
    seed: int
    save: Path | None
    load: Path | None
    buffer_filter: Callable[..., Any] | None


class _Problems:
    """Collects problems, to raise all of them at once."""

    def __init__(self) -> None:
        self.found: list[ConfigProblem] = []

    def add(self, key: str, message: str, hint: str = "") -> None:
        self.found.append(ConfigProblem(key, message, hint=hint))

    def check(self) -> None:
        """Raise ConfigError if there are any."""
        if self.found:
            raise ConfigError("slime's options", self.found)


def _option(args: Any, name: str, default: Any = None) -> Any:
    """An option, or slime's default if it is missing or ``None``."""
    value = getattr(args, name, None)
    return default if value is None else value


def _listed(args: Any, name: str) -> list[Any]:
    value = _option(args, name, [])
    return list(value) if isinstance(value, list | tuple) else [value]


def split_rows(path: str) -> tuple[Path, slice | None]:
    """File and rows of slime's ``path@[begin:end]``; ``None`` for all rows."""
    match = _PATH_OF_ROWS.fullmatch(path)
    if match is None:
        return Path(path), None
    begin, end = (int(text) if text not in ("", "-") else None for text in (match["begin"], match["end"]))
    return Path(match["file"]), slice(begin, end)


def _read_names(args: Any, problems: _Problems) -> tuple[list[str], list[str]]:
    paths = [str(path) for path in _listed(args, "prompt_data")]
    if not paths:
        problems.add("prompt_data", "is missing", "give a list with one prompt file for each source")
    names = [str(name) for name in _listed(args, "prompt_data_source_names")] or [
        split_rows(path)[0].stem for path in paths
    ]
    if len(names) != len(paths):
        problems.add(
            "prompt_data_source_names",
            f"{len(names)} names for {len(paths)} files",
            "give one for each, in their order",
        )
    for name in dict.fromkeys(names):
        if names.count(name) > 1:
            problems.add("prompt_data_source_names", f"{name!r} occurs twice", "give each source a different name")
        if SOURCE_NAME.fullmatch(name) is None:
            hint = "use 1 to 64 of A-Z a-z 0-9 _ . -, and start with a letter, a digit or _"
            problems.add("prompt_data_source_names", f"{name!r} cannot be part of a metric's name", hint)
    return names, paths


def _read_table(args: Any, names: list[str], problems: _Problems) -> WeightTable | None:
    values = _listed(args, "data_source_weights") or ([1.0] if len(names) == 1 else [])
    if len(values) != len(names):
        message = f"{len(values)} weights for {len(names)} sources"
        problems.add("data_source_weights", message, "give one for each, in their order")
        return None
    weights: list[Weight] = []
    for i, value in enumerate(values):
        try:
            weights.append(parse_weight(value))
        except (WeightError, ExpressionError, DottedPathError) as error:
            problems.add(f"data_source_weights[{i}]", error.message)
    for i, weight in enumerate(weights):
        if weight.is_adaptive:
            hint = "use a function of the step only, or run the daemon"
            problems.add(f"data_source_weights[{i}]", f"{weight.text} needs stats, which slime does not provide", hint)
    if len(weights) < len(names):
        return None
    table = WeightTable(names, weights)
    row = table.at(0)
    if names and not any(row.shares.values()):
        problems.add("data_source_weights", "; ".join(("all are 0 at step 0", *row.warnings)))
    return table


def read_weights(args: Any) -> WeightTable:
    """The sources' weights.

    Raises:
        ConfigError: the options of sources and weights cannot be used.
    """
    problems = _Problems()
    names, _ = _read_names(args, problems)
    table = _read_table(args, names, problems)
    problems.check()
    if table is None:
        raise AssertionError("a table that could not be made is a problem")
    return table


def read_reward_caps(args: Any) -> tuple[tuple[str, ...], RewardCaps]:
    """The names of the sources and their reward caps.

    Raises:
        ConfigError: the options of sources and caps cannot be used.
    """
    problems = _Problems()
    names, _ = _read_names(args, problems)
    caps: RewardCaps | None = None
    try:
        caps = RewardCaps(names, _listed(args, "data_source_reward_caps"))
    except (FilterError, WeightError, ExpressionError, DottedPathError) as error:
        problems.add("data_source_reward_caps", error.message)
    problems.check()
    if caps is None:
        raise AssertionError("caps that could not be made are a problem")
    return tuple(names), caps


def _whole(args: Any, name: str, default: int | None, least: int, problems: _Problems) -> int:
    value = _option(args, name, default)
    if type(value) is not int or value < least:
        problems.add(name, f"is {value!r}", f"give a whole number of at least {least}")
        return least
    return value


def _read_prompt_options(args: Any, problems: _Problems) -> PromptOptions:
    if _option(args, "multimodal_keys"):
        problems.add("multimodal_keys", "is not supported by this data source", "remove it")
    kwargs = _option(args, "apply_chat_template_kwargs", {})
    if not isinstance(kwargs, dict):
        problems.add("apply_chat_template_kwargs", f"is {kwargs!r}", "give a JSON object")
        kwargs = {}
    limit = getattr(args, "rollout_max_prompt_len", None)
    return PromptOptions(
        input_key=_option(args, "input_key", "input"),
        label_key=getattr(args, "label_key", None),
        metadata_key=getattr(args, "metadata_key", "metadata"),
        tool_key=getattr(args, "tool_key", "tools"),
        apply_chat_template=bool(_option(args, "apply_chat_template", False)),
        apply_chat_template_kwargs=kwargs,
        max_prompt_tokens=None if limit is None else _whole(args, "rollout_max_prompt_len", None, 1, problems),
        hf_checkpoint=getattr(args, "hf_checkpoint", None),
    )


def _read_buffer_filter(args: Any, problems: _Problems) -> Callable[..., Any] | None:
    if _option(args, "buffer_sort_by_staleness", False):
        problems.add(
            "buffer_sort_by_staleness",
            "is not supported by this data source, which hands out the oldest group first",
            "remove it, or set buffer_filter_path to a function",
        )
    path = _option(args, "buffer_filter_path")
    if path is None:
        return None
    try:
        return resolve(str(path))
    except OrchestratorError as error:
        problems.add("buffer_filter_path", error.message)
        return None


def read_options(args: Any) -> Options:
    """Everything that the data source needs from slime's ``args``.

    Raises:
        ConfigError: an option cannot be used; every one of them is named.
    """
    problems = _Problems()
    if not _option(args, "rollout_global_dataset", True):
        problems.add("rollout_global_dataset", "is off", "set it to true: sources are weighted over their prompt files")
    names, paths = _read_names(args, problems)
    table = _read_table(args, names, problems)
    try:
        RewardCaps(names, _listed(args, "data_source_reward_caps"))
    except (FilterError, WeightError, ExpressionError, DottedPathError) as error:
        problems.add("data_source_reward_caps", error.message)
    batch_size = _whole(args, "rollout_batch_size", None, 1, problems)
    n_samples = _whole(args, "n_samples_per_prompt", 1, 1, problems)
    seed = _whole(args, "rollout_seed", 42, 0, problems)
    prompts = _read_prompt_options(args, problems)
    buffer_filter = _read_buffer_filter(args, problems)
    problems.check()
    if table is None:
        raise AssertionError("a table that could not be made is a problem")
    save, load = _option(args, "save"), _option(args, "load")
    return Options(
        names=tuple(names),
        paths=tuple(paths),
        table=table,
        prompts=prompts,
        rollout_batch_size=batch_size,
        n_samples_per_prompt=n_samples,
        shuffle=bool(_option(args, "rollout_shuffle", False)),
        seed=seed,
        save=None if save is None else Path(save),
        load=None if load is None else Path(load),
        buffer_filter=buffer_filter,
    )
