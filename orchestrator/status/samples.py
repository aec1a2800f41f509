"""The page of a step's samples, ``/samples/12``: plain HTML without a script.

Invariants:

* It shows at most :data:`MAX_SOURCES` sources, and for each the :data:`ENDS` samples with the lowest and highest
  rewards. Texts are cut at :data:`MAX_CHARACTERS`. ``orchestrator show`` prints the rest.
* Whatever comes from the archive is escaped: prompts and responses are shown, never interpreted.
* The archive is read in a worker thread, one step at a time, within :data:`READ_DEADLINE_S`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from html import escape
from statistics import fmean
from typing import Any, Final, Protocol

import anyio
from aiohttp import web

from orchestrator.errors import StateError

__all__ = ["ENDS", "SampleReader", "Samples", "StepSamples"]

ENDS: Final = 3
MAX_SOURCES: Final = 40
MAX_CHARACTERS: Final = 4000
READ_DEADLINE_S: Final = 20.0


class _Excerpt(Protocol):
    @property
    def group(self) -> dict[str, Any]:
        """Without its samples."""
        ...

    @property
    def sample(self) -> dict[str, Any]:
        """As the archive has it."""
        ...


class _SourceSamples(Protocol):
    @property
    def source(self) -> str: ...
    @property
    def weight(self) -> float | None: ...
    @property
    def groups(self) -> int: ...
    @property
    def rewards(self) -> list[float]: ...
    @property
    def lengths(self) -> list[int]: ...
    @property
    def lowest(self) -> Sequence[_Excerpt]: ...
    @property
    def highest(self) -> Sequence[_Excerpt]: ...


class StepSamples(Protocol):
    """What ``orchestrator.archive`` says of a step."""

    @property
    def policy_version(self) -> int | None:
        """The policy version at which the batch was formed."""
        ...

    @property
    def sources(self) -> Sequence[_SourceSamples]:
        """Its sources, each with its samples of lowest and highest reward."""
        ...


SampleReader = Callable[[int, str | None, int], StepSamples]
"""Reads a step: ``(step, source or None for all, samples of lowest and of highest reward)``. Blocks; ``StateError``."""


class Samples:
    """See the module's invariants.

    Args:
        read: reads the archive; ``None``: there is none.
    """

    def __init__(self, read: SampleReader | None) -> None:
        self._read = read
        self._thread = anyio.CapacityLimiter(1)

    async def serve(self, request: web.Request) -> web.Response:
        """The page of one step."""
        step = request.match_info["step"]
        if self._read is None:
            return _page(404, step, "<p>There is no archive: set <code>archive</code> in the config.</p>")
        source = request.query.get("source") or None
        try:
            with anyio.fail_after(READ_DEADLINE_S):
                found = await anyio.to_thread.run_sync(
                    self._read, int(step), source, ENDS, limiter=self._thread, abandon_on_cancel=True
                )
        except StateError as error:
            return _page(404, step, f"<p>{escape(str(error))}</p>")
        except TimeoutError:
            text = f"The archive did not answer within {READ_DEADLINE_S:g} s: use orchestrator show {step} instead."
            return _page(503, step, f"<p>{escape(text)}</p>")
        return _page(200, step, _body(int(step), found))


def _page(status: int, step: str, body: str) -> web.Response:
    text = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f'<title>step {step}</title><link rel="icon" href="data:,"><link rel="stylesheet" href="/page.css"></head>'
        f'<body><header><h1>step {step}</h1><p><a href="/">back to the run</a></p></header>{body}</body></html>'
    )
    return web.Response(status=status, text=text, content_type="text/html")


def _body(step: int, found: StepSamples) -> str:
    before = f'<a href="/samples/{step - 1}">step {step - 1}</a> · ' if step else ""
    parts = [
        f'<p>{before}<a href="/samples/{step + 1}">step {step + 1}</a> · policy version {found.policy_version} ·'
        f" samples with the lowest and highest rewards; for all: <code>orchestrator show {step}</code></p>"
    ]
    parts += [_source(step, source) for source in found.sources[:MAX_SOURCES]]
    if len(found.sources) > MAX_SOURCES:
        parts.append(f"<p>{len(found.sources) - MAX_SOURCES} more sources</p>")
    return "".join(parts)


def _source(step: int, source: _SourceSamples) -> str:
    share = "" if source.weight is None else f" · share {100 * source.weight:.1f}%"
    rewards, lengths = source.rewards, source.lengths
    figures = (
        f"{source.groups} groups, {len(rewards)} samples{share} · reward {fmean(rewards):.4g}"
        f" ({min(rewards):.4g} to {max(rewards):.4g}) · {fmean(lengths):.0f} tokens (at most {max(lengths)})"
        if rewards
        else "no samples"
    )
    name = escape(source.source)
    head = f'<h2><a href="/samples/{step}?source={name}">{name}</a> <small>{figures}</small></h2>'
    shown = [*source.lowest, *reversed(source.highest)]
    return f"<section>{head}{''.join(_sample(excerpt) for excerpt in shown)}</section>"


def _sample(excerpt: _Excerpt) -> str:
    group, sample = excerpt.group, excerpt.sample
    versions = ", ".join(f"{version} ({count} tokens)" for version, count in sample["versions"][:8])
    label = "" if group["label"] is None else f" · label {_cut(_text(group['label']), 200)}"
    return (
        f'<article class="sample"><p><b>reward {float(sample["reward"]):.4g}</b> · {_cut(sample["status"], 20)} ·'
        f" {int(sample['tokens'])} tokens · version {escape(versions)} · group {int(group['group_index'])},"
        f" prompt {_cut(str(group['prompt_index']), 20)}{label}</p>"
        f"<pre>{_cut(_prompt(group), MAX_CHARACTERS)}</pre>"
        f"<pre>{_cut(sample['response'], MAX_CHARACTERS)}</pre></article>"
    )


def _prompt(group: dict[str, Any]) -> str:
    if group["prompt"] is None:
        return f"token ids {group.get('prompt_tokens')}"
    return _text(group["prompt"])


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, indent=1)


def _cut(text: str, most: int) -> str:
    more = f" … ({len(text) - most} more characters)" if len(text) > most else ""
    return escape(text[:most] + more)
