"""Prompt files as slime reads them: JSON lines or Parquet, a slice of rows, chat templates.

Invariants:

* A file is read once and kept in memory, as in slime. A file with bad rows is refused, and the rows are named.
* The order of an epoch depends only on the seed, the source's name, the epoch and the number of rows.

slime has its own options for prompts (``tool_key``, ``path@[begin:end]``, the tokenizer's chat template), so this
reader is separate from the daemon's ``orchestrator.prompts``.
"""

from __future__ import annotations

import copy
import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from orchestrator.errors import PromptFileError

from .options import PromptOptions, split_rows
from .samples import optional_module

__all__ = ["PromptRow", "load_tokenizer", "permutation", "read_prompts", "read_through_slime"]

MAX_PROBLEMS: Final = 20
"""Most bad rows that one error names: enough to see the pattern, few enough to read."""

BATCH_ROWS: Final = 4096
"""Rows of a Parquet file that are turned into Python objects at a time."""


class _BadRow(ValueError):
    """A row is not a prompt; the text says why, without the location."""


@dataclass(frozen=True, slots=True)
class PromptRow:
    """One prompt: text or chat messages, any label, and metadata.

    ``prototype`` is slime's own sample of it, if slime has read the file; it may have more, such as images.
    """

    prompt: str | list[dict[str, Any]]
    label: Any
    metadata: dict[str, Any]
    prototype: Any = None


def permutation(*, seed: int, name: str, epoch: int, rows: int) -> list[int]:
    """The order of one epoch [rows]: rows sorted by random keys from a generator that the arguments seed.

    Python guarantees the sequence of ``random()`` for a seed in all versions, but not the result of ``shuffle``.
    """
    generator = random.Random(f"{seed}/{epoch}/{name}")  # noqa: S311 - an order, not a secret
    keys = [generator.random() for _ in range(rows)]
    return sorted(range(rows), key=keys.__getitem__)


def load_tokenizer(options: PromptOptions) -> Any:
    """Slime's tokenizer if the options need one, else ``None``.

    Raises:
        PromptFileError: they need one, and slime is not installed.
    """
    if not options.apply_chat_template and options.max_prompt_tokens is None:
        return None
    module = optional_module("slime.utils.processing_utils")
    if module is None:
        raise PromptFileError(
            "apply_chat_template and rollout_max_prompt_len need slime's tokenizer, but slime is not installed: remove"
            " them, or put rendered prompts into the files"
        )
    return module.load_tokenizer(options.hf_checkpoint, trust_remote_code=True)


def read_through_slime(args: Any, path: str) -> list[PromptRow] | None:
    """All prompts of a file as slime's own ``RolloutDataSourceWithBuffer`` reads them, in the file's order.

    So our sources support the same formats, templates and images as that version of slime. Order, cursor and buffer are
    ours, because slime's handle one source and are not fully saved.

    Returns:
        ``None`` if slime is not installed, or has no such class.

    Raises:
        PromptFileError: no prompts are left.
    """
    module = optional_module("slime.rollout.data_source")
    kind = getattr(module, "RolloutDataSourceWithBuffer", None)
    if kind is None:
        return None
    own = copy.copy(args)
    own.prompt_data, own.rollout_global_dataset, own.rollout_shuffle, own.buffer_filter_path = path, True, False, None
    samples = kind(own).dataset.samples
    if not samples:
        raise PromptFileError(f"{path}: it has no prompts, or none that are short enough")
    return [PromptRow(sample.prompt, sample.label, dict(sample.metadata or {}), sample) for sample in samples]


def read_prompts(path: str, options: PromptOptions, tokenizer: Any = None) -> list[PromptRow]:
    """All prompts of a file, in its order; those longer than ``max_prompt_tokens`` are left out.

    Args:
        path: a ``.jsonl`` or ``.parquet`` file; ``path@[begin:end]`` takes a slice of its rows, as slime does.
        options: which keys of a row are read, and how.
        tokenizer: of :func:`load_tokenizer`.

    Raises:
        PromptFileError: the file cannot be read, has bad rows (up to 20 are named), or no prompts are left.
    """
    file, part = split_rows(path)
    try:
        rows = _rows_of(file)
        if part is not None:
            rows = iter(list(rows)[part])
        prompts = _parse(file, rows, options, tokenizer)
    except OSError as error:
        raise PromptFileError(f"cannot read {file}: {error.strerror or error}") from error
    if not prompts:
        raise PromptFileError(f"{path}: it has no prompts, or none that are short enough")
    return prompts


def _parse(file: Path, rows: Iterator[tuple[str, Any]], options: PromptOptions, tokenizer: Any) -> list[PromptRow]:
    prompts: list[PromptRow] = []
    problems: list[str] = []
    for place, value in rows:
        try:
            prompt = _parse_row(value, options, tokenizer)
        except _BadRow as error:
            problems.append(f"{file}:{place}: {error}")
            if len(problems) == MAX_PROBLEMS:
                break
            continue
        if prompt is not None:
            prompts.append(prompt)
    if problems:
        raise PromptFileError("\n".join(problems))
    return prompts


def _rows_of(file: Path) -> Iterator[tuple[str, Any]]:
    """Location and value of every row; for a row that is not JSON, the value is a :class:`_BadRow`."""
    readers = {".jsonl": _jsonl_rows, ".parquet": _parquet_rows}
    reader = readers.get(file.suffix.lower())
    if reader is None:
        raise PromptFileError(f"{file}: unknown suffix {file.suffix!r}; use .jsonl or .parquet")
    return reader(file)


def _jsonl_rows(file: Path) -> Iterator[tuple[str, Any]]:
    with file.open(encoding="utf-8-sig") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if line.isspace():
                    continue
                try:
                    yield str(number), json.loads(line)
                except json.JSONDecodeError as error:
                    yield str(number), _BadRow(f"not JSON: {error}")
        except UnicodeDecodeError as error:
            raise PromptFileError(f"{file}: not UTF-8: {error}") from error


def _parquet_rows(file: Path) -> Iterator[tuple[str, Any]]:
    pyarrow = optional_module("pyarrow")
    parquet = optional_module("pyarrow.parquet")
    if pyarrow is None or parquet is None:
        raise PromptFileError(f"{file}: reading Parquet needs pyarrow: pip install 'rollout-orchestrator[prompts]'")
    try:
        with parquet.ParquetFile(file) as table:
            batches = (batch.to_pylist() for batch in table.iter_batches(batch_size=BATCH_ROWS))
            for row, value in enumerate(itertools.chain.from_iterable(batches)):
                yield f"row {row}", value
    except pyarrow.ArrowException as error:
        raise PromptFileError(f"{file}: not a Parquet file that pyarrow can read: {error}") from error


def _parse_row(value: Any, options: PromptOptions, tokenizer: Any) -> PromptRow | None:
    """One row as a prompt; ``None`` for a prompt that is too long.

    Raises:
        _BadRow: it is not a prompt.
    """
    if isinstance(value, _BadRow):
        raise value
    if not isinstance(value, dict):
        raise _BadRow(f"expected an object, not {type(value).__name__}")
    for key in (options.input_key, options.label_key):
        if key is not None and key not in value:
            raise _BadRow(f"no key {key!r}; the row has {', '.join(map(repr, list(value)[:20])) or 'no keys'}")
    metadata = dict(_json_text(value.get(options.metadata_key), dict, str(options.metadata_key)) or {})
    tools = _json_text(value.get(options.tool_key), list, str(options.tool_key))
    if tools is not None:
        metadata["tools"] = tools
    prompt = value[options.input_key]
    if not prompt or not isinstance(prompt, str | list):
        raise _BadRow(f"{options.input_key!r} is {str(prompt)[:40]!r}; expected a text or a list of chat messages")
    if options.apply_chat_template:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        prompt = tokenizer.apply_chat_template(
            messages, tools, tokenize=False, add_generation_prompt=True, **options.apply_chat_template_kwargs
        )
    if options.max_prompt_tokens is not None:
        if not isinstance(prompt, str):
            raise _BadRow("rollout_max_prompt_len can measure only texts: set apply_chat_template")
        if len(tokenizer.encode(prompt, add_special_tokens=False)) > options.max_prompt_tokens:
            return None
    label = None if options.label_key is None else value[options.label_key]
    return PromptRow(prompt, label, metadata)


def _json_text(value: Any, kind: type[Any], key: str) -> Any:
    """A value of that type, also if a file with a fixed schema has it as JSON text."""
    if isinstance(value, str) and value:
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise _BadRow(f"{key!r} is text, but not JSON: {error}") from None
    if value is None or value == "":
        return None
    if not isinstance(value, kind):
        raise _BadRow(f"{key!r} is of type {type(value).__name__}; expected {kind.__name__}")
    return value
