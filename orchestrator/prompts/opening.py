"""From what the config says of a source's prompts to the source."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import anyio.to_thread

from orchestrator.concurrency.processes.reasoning_tasks import TaskSpec

from .files import load_prompts
from .port import PromptSource
from .reasoning import ReasoningPrompts, task_of
from .rows import DEFAULT_INPUT_KEY

__all__ = ["open_prompts"]

DEFAULT_SIZE = 10_000


async def open_prompts(
    *,
    name: str,
    path: Path | str,
    input_key: str = DEFAULT_INPUT_KEY,
    label_key: str | None = None,
    metadata_key: str | None = None,
    max_new_tokens_key: str | None = None,
    shuffle: bool = True,
    epochs: int | None = None,
    size: int | None = None,
    task_seed: int | None = None,
    options: dict[str, Any] | None = None,
    seed: int = 0,
) -> PromptSource:
    """Open the prompts of one source: a file, checked wholly in a worker thread, or a task of reasoning-gym.

    Args:
        name: the source's name; part of what its order is a function of.
        path: a file, see :func:`~orchestrator.prompts.files.load_prompts`; or ``reasoning_gym:TASK``.
        input_key: of files.
        label_key: of files.
        metadata_key: of files.
        max_new_tokens_key: of files.
        shuffle: a new order in every epoch; ``False``: the order of the file or task.
        epochs: how often the prompts are gone through, 1 or more; ``None``: for ever.
        size: of tasks: number of prompts; ``None``: ``DEFAULT_SIZE``.
        task_seed: of tasks: what the prompts are drawn by; ``None``: ``seed``.
        options: of tasks: their own.
        seed: the run's seed, 0 or more.

    Raises:
        PromptFileError: the file or task cannot be used; the message says why.
        ValueError: ``epochs`` or ``seed`` out of range.
    """
    if (task := task_of(path)) is not None:
        spec = TaskSpec(task, seed if task_seed is None else task_seed, size or DEFAULT_SIZE, options or {})
        return await ReasoningPrompts.open(name, spec, shuffle=shuffle, epochs=epochs, seed=seed)
    return await anyio.to_thread.run_sync(
        partial(
            load_prompts,
            name=name,
            path=Path(path),
            input_key=input_key,
            label_key=label_key,
            metadata_key=metadata_key,
            max_new_tokens_key=max_new_tokens_key,
            shuffle=shuffle,
            epochs=epochs,
            seed=seed,
        )
    )
