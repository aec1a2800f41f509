"""The screen of ``orchestrator top``: from a status to lines of text that fit.

Invariants:

* Pure: a status and a size in, lines out. 80 x 24 shows everything that matters; a larger screen shows more.
* Never more lines than the screen has, and never a line wider than it. What is left out is counted.
"""

from __future__ import annotations

import textwrap
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from rich.text import Text

from .status import duration

__all__ = ["render_screen", "sparkline"]

BLOCKS: Final = "▁▂▃▄▅▆▇█"
LOUDNESS: Final = {"late": "bold white on red", "waiting": "black on yellow", "good": "green", "quiet": "dim"}
ENGINE_STYLES: Final = {"up": "green", "trial": "yellow", "updating": "yellow", "draining": "yellow"}
EVENT_STYLES: Final = {"warning": "yellow", "error": "red", "critical": "bold red"}

HEADLINE_LINES: Final = 4
MAX_FAULTS: Final = 3
SOURCE_COLUMNS: Final = 57
"""Characters of a source's line between its name and its tokens or its rewards."""
TOKENS_COLUMN: Final = 7
FIELDS: Final = {
    "group_count": 1,
    "raw_reward/mean": 3,
    "response_len/mean": 7,
    "staleness/mean": 10,
    "staleness/max": 11,
}
"""Their positions in a point of the history. A test compares them with ``orchestrator.status.history.FIELDS``."""


def sparkline(values: Sequence[float | None], width: int) -> str:
    """The newest values as blocks, lowest to highest; a gap where there is none."""
    shown = list(values)[-width:] if width > 0 else []
    known = [value for value in shown if value is not None]
    low, high = min(known, default=0.0), max(known, default=0.0)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    blocks = "".join(" " if value is None else BLOCKS[round((value - low) * scale)] for value in shown)
    return blocks.rjust(max(0, width))


def render_screen(
    status: Mapping[str, Any], width: int, height: int, *, tokens_per_s: float | None = None
) -> list[Text]:
    """The lines of the screen.

    Args:
        status: of the daemon, with a history of some steps.
        width: in columns, at least 40.
        height: in lines, at least 8.
        tokens_per_s: over all engines, if known.
    """
    head: list[Text] = [
        _run_line(status, width),
        *_headline(status, width),
        _work_line(status, tokens_per_s),
        _wait_line(status, width),
        *_faults(status),
    ]
    rest = max(0, height - len(head))
    sources, engines = _sources(status, width), _engines(status, width)
    # Sources first, then engines. A few events are worth more than the tenth engine.
    for_sources = min(len(sources), max(2, rest * 2 // 3))
    for_engines = min(len(engines), max(2, (rest - for_sources) * 2 // 3))
    lines = [*head, *_cut(sources, for_sources), *_cut(engines, for_engines)]
    lines += _events(status, max(0, height - len(lines)))
    for line in lines:
        line.truncate(width, overflow="ellipsis")
    return lines[:height]


def _cut(lines: list[Text], count: int) -> list[Text]:
    if len(lines) <= count:
        return lines
    return [*lines[: max(0, count - 1)], Text(f"… and {len(lines) - count + 1} more", style="dim")][:count]


def _run_line(status: Mapping[str, Any], width: int) -> Text:
    run = status["run"]
    end = f" of {run['num_rollout']}" if run["num_rollout"] else ""
    parts = [f"step {status['step']}{end}", f"version {status['policy_version']}", f"up {duration(run['uptime_s'])}"]
    parts.append("q: quit")
    if len(run["name"]) + len(" · ".join(parts)) + len(f" · pid {run['pid']}") + 2 <= width:
        parts.insert(3, f"pid {run['pid']}")
    line = Text(run["name"], style="bold", no_wrap=True)
    line.append("  " + " · ".join(parts), style="not bold")
    return line


def _headline(status: Mapping[str, Any], width: int) -> list[Text]:
    """The headline, wrapped to at most :data:`HEADLINE_LINES` lines."""
    said = status["headline"]
    lines = textwrap.wrap(said["text"], width - 2, max_lines=HEADLINE_LINES, placeholder=" …")
    return [Text(f" {line}".ljust(width), style=LOUDNESS[said["level"]], no_wrap=True) for line in lines]


def _work_line(status: Mapping[str, Any], tokens_per_s: float | None) -> Text:
    sources = status["sources"].values()
    slots = sum(engine["max_in_flight"] for engine in status["engines"])
    generation = status["generation"]
    parts = [f"requests {generation['in_flight']}/{slots}"]
    if generation["waiting"]:
        parts.append(f"{generation['waiting']} waiting")
    partial = sum(source["partial_groups"] for source in sources)
    in_flight = sum(source["groups"]["in_flight"] for source in sources)
    parts.append(f"groups in flight {in_flight}" + (f" ({partial} partial)" if partial else ""))
    parts.append(f"buffered {sum(source['groups']['buffered'] for source in sources)}")
    if tokens_per_s is not None:
        parts.append(f"{tokens_per_s:,.0f} tokens/s")
    if status["state"]["fault"]:
        parts.append("disk fault")
    return Text(" · ".join(parts), no_wrap=True)


def _faults(status: Mapping[str, Any]) -> list[Text]:
    """Faults of the archive and of the sinks. They delay no batch, but they need attention."""
    archive = status["archive"]
    lines = [Text(f"Archive: {archive['fault']}", style="red")] if archive and archive["fault"] else []
    failing = [sink for sink in status["sinks"] if sink["fault"]]
    lines += [Text(f"Metrics to {sink['name']}: {sink['fault']}", style="yellow") for sink in failing]
    return _cut(lines, MAX_FAULTS)


def _wait_line(status: Mapping[str, Any], width: int) -> Text:
    waits = [point["wait_s"] for point in status["history"]]
    if not waits:
        return Text("no batch has formed yet", style="dim", no_wrap=True)
    text = f"last batch: trainer waited {waits[-1] or 0.0:.1f} s, staleness {_staleness(status)} "
    return Text(text + sparkline(waits, width - len(text)), no_wrap=True)


def _staleness(status: Mapping[str, Any]) -> str:
    """Mean and maximum staleness of the newest batch, in policy versions, over all sources."""
    numbers = status["history"][-1]["sources"].values()
    ages = [(n[FIELDS["group_count"]], n[FIELDS["staleness/mean"]], n[FIELDS["staleness/max"]]) for n in numbers]
    known = [(groups, mean, most) for groups, mean, most in ages if groups and mean is not None and most is not None]
    if not known:
        return "–"
    mean = sum(groups * mean for groups, mean, _ in known) / sum(groups for groups, _, _ in known)
    return f"{mean:.1f} (max {max(most for _, _, most in known):.0f})"


def _history(status: Mapping[str, Any], source: str, field: str) -> list[float | None]:
    """A source's figures over the last steps; a gap where it had no group in the batch."""
    values = []
    for point in status["history"]:
        numbers = point["sources"].get(source)
        has_any = numbers is not None and numbers[FIELDS["group_count"]]
        values.append(numbers[FIELDS[field]] if numbers is not None and has_any else None)
    return values


def _sources(status: Mapping[str, Any], width: int) -> list[Text]:
    longest = max((len(name) for name in status["sources"]), default=0)
    name_width = max(6, min(longest, width - 64, 24))
    has_lengths = width >= name_width + SOURCE_COLUMNS + TOKENS_COLUMN
    spark = max(6, min(40, width - name_width - SOURCE_COLUMNS - (TOKENS_COLUMN if has_lengths else 0)))
    head = f"{'source':<{name_width}}  share next ready flight plan bound handed  drop reward"
    lines = [Text(head + (" tokens" if has_lengths else ""), style="dim underline", no_wrap=True)]
    plan = status["plan"][0] if status["plan"] else None
    for name, source in status["sources"].items():
        rewards, groups = _history(status, name, "raw_reward/mean"), source["groups"]
        reward = next((value for value in reversed(rewards) if value is not None), None)
        share, count = (f"{100 * plan['weights'][name]:.1f}%", plan["counts"][name]) if plan else ("–", "–")
        line = Text(f"{name[:name_width]:<{name_width}}", style="bold", no_wrap=True)
        text = f" {share:>6} {count:>4} {groups['buffered']:>5} {groups['in_flight']:>6} {source['wanted']:>4}"
        text += f" {source['bound']:>5} {source['handed_out']:>6} {groups['dropped']:>5}"
        text += f" {'–' if reward is None else f'{reward:.3f}':>6}"
        if has_lengths:
            lengths = [value for value in _history(status, name, "response_len/mean") if value is not None]
            text += f" {lengths[-1] if lengths else 0:>6.0f}"
        line.append(text, style="not bold")
        line.append(" " + (_state(source) or sparkline(rewards, spark)), style="yellow" if _state(source) else "cyan")
        lines.append(line)
    return lines


def _state(source: Mapping[str, Any]) -> str:
    return " ".join(word for word in ("paused", "exhausted") if source[word])


def _engines(status: Mapping[str, Any], width: int) -> list[Text]:
    longest = max((len(engine["name"]) for engine in status["engines"]), default=0)
    name_width = max(6, min(longest, 24))
    lines = [
        Text(f"{'engine':<{name_width}} state     in flight       tokens failed  late", "dim underline", no_wrap=True)
    ]
    for engine in status["engines"]:
        line = Text(f"{engine['name'][:name_width]:<{name_width}}", style="bold", no_wrap=True)
        line.append(f" {engine['state']:<9}", style=f"not bold {ENGINE_STYLES.get(engine['state'], 'red')}")
        load = f"{engine['in_flight']}/{engine['max_in_flight']}"
        line.append(f" {load:>9} {engine['tokens']:>12,} {engine['failed']:>6} {engine['late']:>5} ", style="not bold")
        line.append(engine["last_error"] or "", style="not bold dim")
        lines.append(line)
    return lines if status["engines"] else [Text("no engines", style="red")]


def _events(status: Mapping[str, Any], height: int) -> list[Text]:
    """As many events as fit, newest first."""
    if height < 2 or not status["events"]:
        return []
    lines = [Text("events", style="dim underline", no_wrap=True)]
    for event in list(reversed(status["events"]))[: height - 1]:
        source = f"{event['source']}: " if event["source"] else ""
        clock = time.strftime("%H:%M:%S", time.localtime(event["time"]))
        message = "".join(c if c.isprintable() else " " for c in event["message"])
        lines.append(Text(f"{clock} {source}{message}", style=EVENT_STYLES.get(event["level"], ""), no_wrap=True))
    return lines
