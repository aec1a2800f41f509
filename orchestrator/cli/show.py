"""``orchestrator show``: what was trained on at a step, read from the archive. No daemon has to run.

Invariants:

* The output is bounded: texts are cut unless ``--full`` is given.
* No prompt or response can send control characters to the terminal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from cyclopts.validators import Number

from .live import CONNECT_TIMEOUT_S, Socket

if TYPE_CHECKING:
    from rich.console import RenderableType

    from orchestrator.archive import ArchivedStep, Excerpt

__all__ = ["show"]

PROMPT_CHARACTERS = 600
RESPONSE_CHARACTERS = 1200
"""How much of a text is shown without --full: a prompt and its response fit on a screen."""


def show(
    step: str,
    /,
    *,
    source: str | None = None,
    worst: Annotated[int | None, Parameter(validator=Number(gte=1, lte=10_000))] = None,
    full: Annotated[bool, Parameter(negative=())] = False,
    as_json: Annotated[bool, Parameter(name="--json", negative=())] = False,
    history: str | None = None,
    archive: Path | None = None,
    config: Path | None = None,
    socket: Socket = None,
) -> int:
    """Show what was trained on at a step: prompts, responses, rewards and versions.

    The archive is the one of --archive, of --config, or of the running daemon.

    Parameters
    ----------
    step
        Number of the step, or "last" for the newest archived one.
    source
        Show only groups of this source.
    worst
        Show only this many samples, the lowest rewards first.
    full
        Do not cut long texts.
    as_json
        Print one JSON object a line: a group, or with --worst a sample with its group.
    history
        Which history to show if the step was trained on again after a checkpoint was loaded (default: the newest).
    archive
        Directory of the archive.
    config
        Config file that names the archive.
    socket
        The daemon's socket.
    """
    from orchestrator.archive import find_step

    from .exit_codes import OK, USAGE

    if step != "last" and not (step.isdecimal() and len(step) < 19):
        import sys

        print(f"orchestrator show: the step must be a number or `last`, not {step[:40]!r}", file=sys.stderr)
        return USAGE
    directory = _directory(archive, config, socket)
    file, others = find_step(directory, None if step == "last" else int(step), history)
    if as_json:
        _print_json(file, source, worst)
    else:
        _print(file, others, source, worst, full=full)
    return OK


def _directory(archive: Path | None, config: Path | None, socket: Path | None) -> Path:
    """Where the archive is.

    Raises:
        ArchiveError: nothing is archived.
        ConfigError: the config cannot be read.
    """
    from orchestrator.errors import ArchiveError

    if archive is not None:
        return archive
    nothing = "there is no archive: set `archive` in the config"
    if config is not None:
        from orchestrator.config import read_config

        section = read_config(config).config.archive
        if section is None:
            raise ArchiveError(f"{config}: {nothing}")
        return section.path
    from orchestrator.client import RolloutClient
    from orchestrator.errors import ConnectionLost

    try:
        with RolloutClient(socket, connect_timeout_s=CONNECT_TIMEOUT_S, client="orchestrator show") as client:
            facts = client.status()["archive"]
    except ConnectionLost as error:
        raise ArchiveError(f"{error}; or name the archive: --archive DIRECTORY, or --config FILE") from error
    if facts is None:
        raise ArchiveError(nothing)
    return Path(facts["path"])


def _print_json(file: ArchivedStep, source: str | None, worst: int | None) -> None:
    import sys

    import orjson

    from orchestrator.archive import read_groups, read_samples

    if worst is None:
        rows: Iterator[Mapping[str, Any]] = read_groups(file, source)
    else:
        rows = (e.group | {"sample": e.sample} for e in read_samples(file, source=source, worst=worst))
    for row in rows:
        sys.stdout.write(orjson.dumps(row).decode() + "\n")


def _print(
    file: ArchivedStep, others: list[ArchivedStep], source: str | None, worst: int | None, *, full: bool
) -> None:
    from .check import write_out

    for part in _parts(file, others, source, worst, full=full):
        write_out(_rendered(part))


def _rendered(part: RenderableType) -> str:
    from rich.console import Console

    console = Console(highlight=False)
    with console.capture() as capture:  # rich would end the process itself on a closed pipe
        console.print(part)
    return capture.get()


def _parts(
    file: ArchivedStep, others: list[ArchivedStep], source: str | None, worst: int | None, *, full: bool
) -> Iterator[RenderableType]:
    from orchestrator.archive import Excerpt, read_groups, read_samples

    yield from _head(file, others, source)
    if worst is not None:
        for excerpt in read_samples(file, source=source, worst=worst):
            yield _rule(excerpt.group)
            yield from _prompt(excerpt.group, full=full)
            yield from _sample(excerpt, full=full)
        return
    for group in read_groups(file, source):
        yield _rule(group)
        yield from _prompt(group, full=full)
        for sample in sorted(group["samples"], key=lambda sample: float(sample["reward"])):
            yield from _sample(Excerpt(group, sample), full=full)


def _head(file: ArchivedStep, others: list[ArchivedStep], source: str | None) -> Iterator[RenderableType]:
    from statistics import fmean

    from rich import box
    from rich.table import Table
    from rich.text import Text

    from orchestrator.archive import survey
    from orchestrator.errors import ArchiveError

    found = survey(file, source=source)
    if source is not None and not found.sources:
        known = ", ".join(at.source for at in survey(file).sources)
        raise ArchiveError(f"step {file.step} has no group of {source!r}; it has groups of {known}")
    yield Text(f"step {file.step} · policy version {found.policy_version} · {file.path}", style="bold")
    if others:
        names = ", ".join(other.history for other in others)
        yield Text(f"This step was trained on more than once: --history {names} shows the others.", style="yellow")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("source", style="bold", no_wrap=True)
    for column in ("share", "groups", "samples", "reward", "lowest", "highest", "tokens", "longest"):
        table.add_column(column, justify="right")
    for at in found.sources:
        rewards, lengths = at.rewards or [float("nan")], at.lengths or [0]
        figures = (fmean(rewards), min(rewards), max(rewards))
        table.add_row(
            at.source,
            "–" if at.weight is None else f"{100 * at.weight:.1f}%",
            str(at.groups),
            str(len(at.rewards)),
            *(f"{figure:.4g}" for figure in figures),
            f"{fmean(lengths):.0f}",
            str(max(lengths)),
        )
    yield table


def _rule(group: Mapping[str, Any]) -> RenderableType:
    from rich.rule import Rule
    from rich.text import Text

    title = f"{group['source']} · group {group['group_index']} · prompt {group['prompt_index']}, epoch {group['epoch']}"
    return Rule(Text(title), align="left")


def _prompt(group: Mapping[str, Any], *, full: bool) -> Iterator[RenderableType]:
    from rich.text import Text

    prompt = group["prompt"]
    text = f"token ids {group.get('prompt_tokens')}" if prompt is None else _text(prompt)
    yield Text(_cut(text, None if full else PROMPT_CHARACTERS), style="cyan")
    if group["label"] is not None:
        yield Text(f"label: {_cut(_text(group['label']), None if full else PROMPT_CHARACTERS)}", style="dim")


def _sample(excerpt: Excerpt, *, full: bool) -> Iterator[RenderableType]:
    from rich.padding import Padding
    from rich.text import Text

    sample = excerpt.sample
    versions = ", ".join(f"{version}" for version, _ in sample["versions"])
    yield Text.assemble(
        (f"reward {excerpt.reward:.4g}", "bold"),
        f" · {_cut(str(sample['status']), 20)} · {sample['tokens']} tokens · version {versions or '–'}"
        f" · sample {sample['index']}",
    )
    yield Padding(Text(_cut(sample["response"], None if full else RESPONSE_CHARACTERS)), (0, 0, 1, 2))


def _text(value: Any) -> str:
    import json

    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _cut(text: str, most: int | None) -> str:
    more = ""
    if most is not None and len(text) > most:
        text, more = text[:most], f" … ({len(text) - most} more characters: use --full)"
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text) + more
