"""Reward functions as users write them, good and bad; named by dotted path in the tests of rewards."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import threading
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import anyio
import numpy as np

from orchestrator.records import Prompt, Sample

print("printed when imported")


def length(sample: Sample, prompt: Prompt) -> int:
    return len(sample.text)


def label(sample: Sample, prompt: Prompt) -> Any:
    return prompt.label


class Instance:
    def __call__(self, sample: Sample, prompt: Prompt) -> float:
        return 0.5


class AsyncInstance:
    async def __call__(self, sample: Sample, prompt: Prompt) -> int:
        await anyio.lowlevel.checkpoint()
        return os.getpid()


instance = Instance()
async_instance = AsyncInstance()
not_callable = 3

RETURNS: dict[str, Any] = {
    "none": None,
    "text": "1.0",
    "list": [1.0],
    "complex": 1j,
    "decimal": Decimal(1),
    "nan": float("nan"),
    "infinite": float("-inf"),
    "numpy nan": np.float32("nan"),
    "true": True,
    "float32": np.float32(0.5),
    "int64": np.int64(3),
    "fraction": Fraction(1, 4),
    "dict": {"score": 0.5, "why": "close"},
    "dict of numpy": {"score": np.float64(0.5), "parts": np.arange(3), 7: float("nan")},
    "dict with text": {"score": "0.5"},
    "dict with nan": {"score": float("nan")},
    "dict with set": {"score": 1, "seen": {1}},
    "large dict": {"score": 1, "text": "x" * 100_000},
    "empty dict": {},
}


def returns(sample: Sample, prompt: Prompt) -> Any:
    return RETURNS[str(prompt.label)]


async def returns_async(sample: Sample, prompt: Prompt) -> Any:
    await anyio.lowlevel.checkpoint()
    return RETURNS[str(prompt.label)]


class StrangeError(Exception):
    """Cannot be made from its own arguments, nor be put into words."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__()

    def __str__(self) -> str:
        raise ValueError("no words")


def _raise(what: str) -> None:
    match what:
        case "plain":
            raise KeyError("no such answer")
        case "timeout":
            raise TimeoutError("of the function's own")
        case "strange":
            raise StrangeError(1, 2)
        case "long":
            raise ValueError("x" * 10_000_000)
        case "exit":
            sys.exit(3)


def raises(sample: Sample, prompt: Prompt) -> float:
    _raise(str(prompt.label))
    return 1.0


async def raises_async(sample: Sample, prompt: Prompt) -> float:
    await anyio.lowlevel.checkpoint()
    _raise(str(prompt.label))
    return 1.0


def crashes(sample: Sample, prompt: Prompt) -> float:
    """Ends its process as the label says, or returns 1."""
    match prompt.label:
        case "exit":
            os._exit(7)
        case "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        case "segfault":
            ctypes.string_at(0)
        case "garbage":
            _write_as_answer((2).to_bytes(4, "little") + bytes(4) + b"{]")
        case "huge":
            _write_as_answer(b"\xff" * 8)
    return 1.0


def _write_as_answer(data: bytes) -> None:
    """Write to the pipe on which answers go back, which is the last that the worker opened."""
    names = [int(name) for name in os.listdir("/proc/self/fd")]
    pipes = [fd for fd in names if fd > 2 and _is_pipe(fd)]
    os.write(max(pipes), data)


def _is_pipe(descriptor: int) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}").startswith(("pipe:", "socket:"))
    except FileNotFoundError:  # the listing's own descriptor is gone
        return False


def hangs(sample: Sample, prompt: Prompt) -> float:
    """Hangs for ever if the prompt has a label, a FIFO, after writing the ids of itself and of a child to it."""
    if prompt.label is None:
        return 1.0
    child = subprocess.Popen(["sleep", "600"])
    Path(prompt.label).write_text(f"{os.getpid()} {child.pid}")
    threading.Event().wait()
    return 0.0


async def hangs_async(sample: Sample, prompt: Prompt) -> float:
    if prompt.label == "hang":
        await anyio.sleep_forever()
    return 1.0


def prints(sample: Sample, prompt: Prompt) -> float:
    """Prints in every way there is, more than a pipe holds, and reads standard input."""
    print("x" * 100_000)
    os.write(1, b"y" * 100_000)
    subprocess.run(["echo", "z" * 1000], check=True)
    sys.stdout.flush()
    return float(len(sys.stdin.read()) + len(subprocess.run(["cat"], capture_output=True, check=True).stdout))


def descriptors(sample: Sample, prompt: Prompt) -> dict[str, Any]:
    """What a program started without closing descriptors has open."""
    program = (
        "import os\nfor fd in range(3, 300):\n  if os.path.exists(p := f'/proc/self/fd/{fd}'): print(os.readlink(p))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program], close_fds=False, capture_output=True, text=True, check=True
    )
    return {"score": 1, "open": answer.stdout.split()}


def process_id(sample: Sample, prompt: Prompt) -> int:
    return os.getpid()


def alarm(sample: Sample, prompt: Prompt) -> bool:
    """A deadline of the function's own, as math verifiers have: Python allows it in the main thread only."""
    signal.signal(signal.SIGALRM, lambda *_: None)
    return True


def whole(sample: Sample, prompt: Prompt) -> dict[str, Any]:
    """What arrives of a sample and its prompt."""
    return {"score": 1, "sample": repr(sample), "prompt": repr(prompt)}


def meets(sample: Sample, prompt: Prompt) -> int:
    """How many calls are inside at most, counted in a file; goes on when a byte can be had from the gate."""
    directory = Path(prompt.label)
    most = _count(directory, +1)
    with (directory / "entered").open("wb", buffering=0) as entered:
        entered.write(b".")
    with (directory / "gate").open("rb", buffering=0) as gate:
        gate.read(1)
    _count(directory, -1)
    return most


def _count(directory: Path, change: int) -> int:
    with (directory / "inside").open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        inside = int(file.read()) + change
        file.seek(0)
        file.write(f"{inside:4}")
        return inside


# -- whole groups -----------------------------------------------------------------------------------------------------

GROUP_RETURNS: dict[str, Any] = {
    "ranks": [2.0, 1, True],
    "array": np.array([0.5, 0.25, 0.0], dtype=np.float32),
    "dicts": [{"score": 1, "place": n} for n in range(3)],
    "dict": {"score": [3, 2, 1], "why": "ordered"},
    "tuple": (1.0, 2.0, 3.0),
    "too few": [1.0, 2.0],
    "too many": [1.0] * 4,
    "none": None,
    "number": 1.0,
    "text": "abc",
    "nan inside": [1.0, float("nan"), 1.0],
    "text inside": [1.0, "2", 1.0],
    "dict of a number": {"score": 1.0},
    "scalar array": np.float64(1.0),
}


def ranks(samples: list[Sample], prompt: Prompt) -> Any:
    """The longest text first, where the label names nothing else."""
    if prompt.label in GROUP_RETURNS:
        return GROUP_RETURNS[prompt.label]
    order = sorted(range(len(samples)), key=lambda slot: -len(samples[slot].text))
    return [order.index(slot) for slot in range(len(samples))]


async def ranks_async(samples: list[Sample], prompt: Prompt) -> Any:
    await anyio.lowlevel.checkpoint()
    return ranks(samples, prompt)


def whole_group(samples: list[Sample], prompt: Prompt) -> list[dict[str, Any]]:
    return [{"score": 1, "sample": repr(sample), "prompt": repr(prompt)} for sample in samples]
