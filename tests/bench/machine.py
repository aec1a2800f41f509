"""What the figures were measured on: versions, cores, load."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

from tests.bench.peers import REQUIREMENTS

OURS = ("aiohttp", "anyio", "msgspec", "numpy", "orjson", "uvloop")


def load() -> str:
    """How busy the machine is; above the number of cores somebody else takes part of it."""
    return "load {:.2f} {:.2f} {:.2f}".format(*os.getloadavg())


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"


def describe(peers: tuple[str, ...]) -> dict[str, str]:
    """By what is told; ``peers`` are those that run in environments of their own."""
    told = {
        "commit": _commit(),
        "processor": f"{_processor()}, {len(os.sched_getaffinity(0))} cores to run on",
        "system": f"Linux {platform.release()}, Python {platform.python_version()}",
        "packages": ", ".join(f"{name} {version(name)}" for name in OURS),
        "load before": load(),
    }
    pinned = ", ".join(line for peer in peers for line in REQUIREMENTS[peer])
    if pinned:
        told["peers"] = pinned
    return told
