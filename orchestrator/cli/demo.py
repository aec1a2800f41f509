"""``orchestrator demo``: a daemon, an engine and a trainer for a few batches, to see what it does.

Invariants:

* The trainer side is what any trainer does: :class:`~orchestrator.client.RolloutClient` and nothing else.
* Everything is written to a folder of its own, which is removed unless ``--keep`` names it.
* The daemon is a child process; it is stopped by SIGTERM and waited for, whatever happens here.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

from cyclopts import Parameter, validators

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from orchestrator.client import Batch, RolloutClient

__all__ = ["demo"]

START_DEADLINE_S: Final = 60.0
"""Making a model and starting the engine takes two seconds on a laptop."""

BATCH_DEADLINE_S: Final = 120.0
"""A batch takes about a second; a demo that hangs must end and say why."""

STOP_DEADLINE_S: Final = 30.0


@dataclass(slots=True)
class _Tally:
    """One source: what was asked for and what came, in groups; rewards and response lengths of all samples."""

    asked: float = 0.0
    received: int = 0
    rewards: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)


def demo(
    *,
    batches: Annotated[int, Parameter(validator=validators.Number(gte=1, lte=100_000))] = 24,
    config: Path | None = None,
    keep: Path | None = None,
) -> int:
    """Run a daemon with its engine and a small trainer, and show what the trainer gets.

    Parameters
    ----------
    batches
        How many batches the trainer takes.
    config
        A config file; without it two sources of sums that cross over, and a tiny random model that is made on the spot.
    keep
        A folder for state, logs and config, which stays; it must not exist or be empty.
    """
    from rich.console import Console

    console = Console(highlight=False)
    config = config or _shipped_config()
    with _folder(keep) as folder:
        settings = _write_config(config, folder, batches)
        console.print(f"Starting the daemon on {config.name} ({', '.join(settings['sources'])}) …")
        with _daemon(folder, console) as process:
            started = time.monotonic()
            tallies = _train(settings, process, console)
            seconds = time.monotonic() - started
        console.print(_summary(tallies, batches, seconds))
        if keep is not None:
            console.print(f"State, logs and config are in {folder}")
    return 0


def _shipped_config() -> Path:
    """``demo.yaml`` of the repository, or of the installed package."""
    package = Path(__file__).resolve().parents[1]
    return next(
        path for path in (package / "shipped" / "demo.yaml", package.parent / "config" / "demo.yaml") if path.exists()
    )


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="orchestrator-demo-") as name:
            yield Path(name)
    else:
        keep.mkdir(parents=True, exist_ok=True)
        if any(keep.iterdir()):
            raise SystemExit(f"{keep} is not empty: name a new folder with --keep")
        yield keep.resolve()


def _write_config(path: Path, folder: Path, batches: int) -> dict[str, Any]:
    """Write the config with a folder and a number of batches of its own; returns what the trainer needs."""
    from orchestrator.config import load_config

    config = load_config(path)
    data = config.model_dump(mode="json", exclude_unset=True, warnings=False)
    data["run"]["state_dir"] = str(folder / "state")
    data["consumer"]["socket"] = str(folder / "socket")
    data["logging"]["file"] = str(folder / "daemon.jsonl")
    data["status"]["http"] = None
    data["rollout"]["num_rollout"] = batches
    (folder / "config.yaml").write_text(json.dumps(data, indent=1))
    return {
        "socket": folder / "socket",
        "sources": list(config.source_names),
        "batches": batches,
        "batch_size": config.rollout.rollout_batch_size,
    }


@contextmanager
def _daemon(folder: Path, console: Console) -> Iterator[subprocess.Popen[bytes]]:
    """The daemon as a child; its last words are shown if it fails."""
    command = [sys.executable, "-m", "orchestrator", "run", str(folder / "config.yaml")]
    with (folder / "daemon.err").open("wb") as errors:
        process = subprocess.Popen(command, stdout=errors, stderr=errors, cwd=os.getcwd())  # noqa: S603 - our own command
    try:
        yield process
    except BaseException:
        console.print(_last_words(folder), style="red", markup=False)
        raise
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _last_words(folder: Path) -> str:
    lines = (folder / "daemon.err").read_text(errors="replace").splitlines()[-10:]
    log = folder / "daemon.jsonl"
    if log.exists():
        lines += [line for line in log.read_text(errors="replace").splitlines() if '"log.level":"info"' not in line][
            -5:
        ]
    return "\n".join(lines)


def _connect(settings: dict[str, Any], process: subprocess.Popen[bytes]) -> RolloutClient:
    """A client of the daemon, once it listens.

    Raises:
        SystemExit: it ended, or took too long.
    """
    from orchestrator.client import RolloutClient
    from orchestrator.errors import ConnectionLost

    deadline = time.monotonic() + START_DEADLINE_S
    while process.poll() is None and time.monotonic() < deadline:
        client = RolloutClient(settings["socket"], client="demo trainer", connect_timeout_s=1.0)
        try:
            client.connect()
        except ConnectionLost:
            continue
        return client
    if process.poll() is None:
        raise SystemExit(f"the daemon does not listen after {START_DEADLINE_S:g} s")
    raise SystemExit(f"the daemon ended with exit code {process.returncode}")


def _train(settings: dict[str, Any], process: subprocess.Popen[bytes], console: Console) -> dict[str, _Tally]:
    """What a trainer does, but for the gradients."""
    from rich.live import Live

    tallies = {name: _Tally() for name in settings["sources"]}
    with _connect(settings, process) as client, Live(console=console, refresh_per_second=8) as live:
        if not console.is_terminal:
            live.stop()
        for batch in client.batches(timeout_s=BATCH_DEADLINE_S):
            advantages = batch.advantages()
            _count(tallies, batch, settings["batch_size"])
            # here a trainer computes its gradients; afterwards new parameters are live in the engines
            client.set_policy_version(batch.step + 1)
            if console.is_terminal:
                live.update(_progress(tallies, batch, settings["batches"]))
            else:
                shares = ", ".join(f"{name} {batch.counts[name]}" for name in tallies)
                console.print(f"step {batch.step}: {shares}; mean |advantage| {abs(advantages).mean():.2f}")
    return tallies


def _count(tallies: dict[str, _Tally], batch: Batch, batch_size: int) -> None:
    for name, tally in tallies.items():
        tally.asked += batch_size * batch.weights[name]
    for group in batch.groups:
        tally = tallies[group.source]
        tally.received += 1
        tally.rewards.extend(sample.reward for sample in group.samples)
        tally.lengths.extend(len(sample.response_tokens) for sample in group.samples)


def _progress(tallies: dict[str, _Tally], batch: Batch, batches: int) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title=f"batch {batch.step + 1} of {batches}", title_justify="left")
    for column in ("source", "weight", "groups", "", "mean reward", "mean tokens"):
        table.add_column(column, justify="left" if column in ("source", "") else "right")
    for name, tally in tallies.items():
        table.add_row(
            name,
            f"{100 * batch.weights[name]:.1f} %",
            str(batch.counts[name]),
            "█" * batch.counts[name],
            f"{sum(tally.rewards) / max(1, len(tally.rewards)):.3f}",
            f"{sum(tally.lengths) / max(1, len(tally.lengths)):.1f}",
        )
    return table


def _summary(tallies: dict[str, _Tally], batches: int, seconds: float) -> Table:
    from rich import box
    from rich.table import Table

    samples = sum(len(tally.rewards) for tally in tallies.values())
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"{batches} batches, {samples} samples in {seconds:.1f} s",
        title_justify="left",
    )
    for column in ("source", "groups asked for", "groups received", "difference", "mean reward", "mean tokens"):
        table.add_column(column, justify="left" if column == "source" else "right")
    for name, tally in tallies.items():
        table.add_row(
            name,
            f"{tally.asked:.2f}",
            str(tally.received),
            f"{tally.received - tally.asked:+.2f}",
            f"{sum(tally.rewards) / max(1, len(tally.rewards)):.3f}",
            f"{sum(tally.lengths) / max(1, len(tally.lengths)):.1f}",
        )
    return table
