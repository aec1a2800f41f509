"""What a config names, looked at before a run begins: functions, prompt files, the weights of the coming steps.

Invariants:

* No engine is contacted, no process is started, nothing is written.
* All problems are collected; one source's broken prompt file does not hide another's weight that goes below zero.
* A batch fits the buffers: no source's ``buffer.groups`` is below the most groups that a coming batch takes from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from orchestrator.core.filters import load_filter
from orchestrator.core.mixture.plan import PlannedBatch, forecast
from orchestrator.core.weights.forms import Weight, parse_weight
from orchestrator.core.weights.table import WeightTable
from orchestrator.errors import DottedPathError, ExpressionError, OrchestratorError, PromptFileError, WeightError
from orchestrator.prompts import PromptSource
from orchestrator.tokenizer import find_problem

from .document import Config
from .sources import Source
from .text import Finding, Location

__all__ = ["Examination", "examine", "find_broken_weights", "load_weights", "plan_from_start"]

STEPS_WHEN_ENDLESS: Final = 1000
"""Steps that are looked at where ``num_rollout`` is null: five times the length of the built-in schedules."""

MAX_STEPS: Final = 100_000
"""Steps that are looked at at most: a few seconds of evaluating; longer runs than this have not been seen."""

ROWS_WITH_LABELS: Final = 1000
"""Rows of a file that are looked at for labels: reading all of a large one takes minutes, and labels are missing
everywhere or nowhere."""

BYTES_PER_TOKEN: Final = 4 + 4 + 1
"""A response token in a stored group: its id, its log-probability, its mask."""


@dataclass(slots=True)
class Examination:
    """What was found.

    ``prompts``: number of rows of each source that could be opened; ``plan``: the coming batches, empty where weights
    are broken; ``adaptive``: the sources whose weights follow the run, which the plan shows as before anything is seen;
    ``findings``: what keeps the config from being used; ``warnings``: what may be meant.
    """

    prompts: dict[str, int] = field(default_factory=dict)
    plan: tuple[PlannedBatch, ...] = ()
    adaptive: tuple[str, ...] = ()
    findings: list[Finding] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


async def examine(config: Config, *, directory: Path) -> Examination:
    """Look at everything that the config names.

    Args:
        config: a loaded config.
        directory: where dotted paths are looked up beside ``sys.path``: the working directory.
    """
    result = Examination()
    if config.tokenizer is not None and (problem := find_problem(config.tokenizer.path)) is not None:
        result.findings.append(Finding(("tokenizer",), problem))
    for source_index, source in enumerate(config.data_sources):
        await _examine_prompts(config, source_index, source, result)
        await _examine_reward(source_index, source, directory, result)
    try:
        load_filter(config.dynamic_sampling_filter, directory=directory)
    except OrchestratorError as error:
        result.findings.append(Finding(("dynamic_sampling_filter",), error.message))
    steps = min(config.rollout.num_rollout or STEPS_WHEN_ENDLESS, MAX_STEPS)
    _examine_caps(config, steps, directory, result)
    table, problems = load_weights(config, directory=directory)
    result.findings += problems
    if table is not None:
        _examine_plan(config, table, steps, result)
    return result


# -- functions --------------------------------------------------------------------------------------------------------


def load_weights(config: Config, *, directory: Path) -> tuple[WeightTable | None, list[Finding]]:
    """The table of the config's weights, or ``None`` and what is wrong with them."""
    weights, findings = _parse_all("data_source_weights", config.data_source_weights, directory)
    return (None if findings else WeightTable(config.source_names, list(weights.values()))), findings


def _parse_all(
    key: str, texts: Sequence[float | str | None], directory: Path
) -> tuple[dict[int, Weight], list[Finding]]:
    """The weights by their position, without those that are null, and what is wrong with the others."""
    weights: dict[int, Weight] = {}
    findings = []
    for index, text in enumerate(texts):
        try:
            if text is not None:
                weights[index] = parse_weight(text, directory=directory)
        except (DottedPathError, ExpressionError, WeightError) as error:
            findings.append(Finding((key, index), error.message))
    return weights, findings


def _examine_caps(config: Config, steps: int, directory: Path, result: Examination) -> None:
    key = "data_source_reward_caps"
    caps, findings = _parse_all(key, config.data_source_reward_caps or (), directory)
    result.findings += findings
    for index, cap in caps.items():
        result.findings += _find_broken(cap, (key, index), steps)


async def _examine_reward(index: int, source: Source, directory: Path, result: Examination) -> None:
    try:
        reward = source.reward.build(directory=directory)
    except (DottedPathError, ValueError) as error:
        result.findings.append(Finding(("data_sources", index, "reward"), str(error)))
    else:
        await reward.aclose()


# -- prompt files -----------------------------------------------------------------------------------------------------


async def _examine_prompts(config: Config, index: int, source: Source, result: Examination) -> None:
    location = ("data_sources", index, "prompts", source.prompts.place)
    try:
        prompts = await source.prompts.open(name=source.name, seed=config.run.seed)
    except PromptFileError as error:
        result.findings.append(Finding(location, error.message))
        return
    result.prompts[source.name] = len(prompts)
    async with aclosing(prompts):
        row = await _row_without_label(prompts) if source.reward.needs_label else None
    if row is not None:
        result.findings.append(
            Finding(
                location,
                f"row {row} has no label, which {source.reward.name} compares with: its responses could not be scored",
                "set prompts.label_key to the key that holds it, or use a reward that needs no label",
            )
        )


async def _row_without_label(prompts: PromptSource) -> int | None:
    for row in range(min(len(prompts), ROWS_WITH_LABELS)):
        if (await prompts.read(row, 0)).label is None:
            return row
    return None


# -- the coming batches -----------------------------------------------------------------------------------------------


def plan_from_start(config: Config, table: WeightTable, steps: int) -> tuple[PlannedBatch, ...]:
    """The first ``steps`` batches of a run with these weights, nothing paused, borrowed or exhausted."""
    names = config.source_names
    return forecast(
        table,
        step=0,
        carry=dict.fromkeys(names, 0.0),
        size=config.rollout.rollout_batch_size,
        horizon=steps,
        active=names,
    )


def _examine_plan(config: Config, table: WeightTable, steps: int, result: Examination) -> None:
    if broken := find_broken_weights(table, steps):
        result.findings += broken
        return
    result.plan, result.adaptive = plan_from_start(config, table, steps), table.adaptive
    for index, source in enumerate(config.data_sources):
        peak = max(result.plan, key=lambda batch: batch.counts[source.name])
        _examine_buffer(config, index, source, peak, result)
        _examine_supply(config, source, result)


def find_broken_weights(table: WeightTable, steps: int) -> list[Finding]:
    """Where the weights of the coming steps cannot be used; at run time the last good ones would stand in."""
    key = "data_source_weights"
    broken = [f for i, name in enumerate(table.names) for f in _find_broken(table.weight(name), (key, i), steps)]
    if broken:
        return broken
    zero = next((step for step in range(steps) if not any(table.at(step).shares.values())), None)
    if zero is None:
        return []
    message = f"all weights are 0 at step {zero}: that batch could never be formed"
    return [Finding((key,), message, "at least one must be above 0 at every step")]


def _find_broken(weight: Weight, location: Location, steps: int) -> Iterator[Finding]:
    """The first of the steps at which one weight, or cap, has no value."""
    for step in range(steps):
        try:
            weight(step)
        except WeightError as error:
            yield Finding(location, error.message, f"must be finite and at least 0 at every step below {steps}")
            return


def _examine_buffer(config: Config, index: int, source: Source, peak: PlannedBatch, result: Examination) -> None:
    count, rollout = peak.counts[source.name], config.rollout
    if source.buffer.groups is not None and source.buffer.groups < count:
        result.findings.append(
            Finding(
                ("data_sources", index, "buffer", "groups"),
                f"is {source.buffer.groups}, but the batch of step {peak.step} needs {count} groups of {source.name}",
                f"use at least {count}, or null",
            )
        )
    longest = config.sampling_of(source.name).max_new_tokens * rollout.n_samples_per_prompt * BYTES_PER_TOKEN
    if count * longest > source.buffer.bytes:
        result.warnings.append(
            f"{source.name}: {count} groups of the longest responses take {count * longest:,} bytes, but buffer.bytes "
            f"is {source.buffer.bytes:,}; what the next batch lacks is launched beyond that bound"
        )


def _examine_supply(config: Config, source: Source, result: Examination) -> None:
    rows, epochs = result.prompts.get(source.name), source.prompts.epochs
    asked = sum(batch.counts[source.name] for batch in result.plan)
    if rows is not None and epochs is not None and rows * epochs < asked:
        result.warnings.append(
            f"{source.name}: {rows} prompts for {epochs} epochs, but the next {len(result.plan)} batches need "
            f"{asked} groups of it. It will run out, and the other sources take its share"
        )
