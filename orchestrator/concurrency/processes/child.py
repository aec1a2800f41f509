"""The process in which a service runs: ``python -m orchestrator.concurrency.processes.child``.

Invariants:

* One service a process, one call at a time, in the main thread (so that ``signal.alarm`` works in it).
* Standard input and output belong to the daemon and are moved out of the way before any user code is imported:
  what the function, or a program that it starts, prints goes to standard error and cannot spoil an answer.
* The process ends with the daemon, even in the middle of a call, and takes the processes that it started with it.
* It may be killed at any time and has nothing to save; where memory runs out it is the first to go, not the daemon.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from orchestrator.core.dotted import resolve
from orchestrator.errors import DottedPathError

from .messages import PREFIX, ServiceRefused, encode_message

__all__ = ["main"]


def main() -> None:
    """Serve calls until the daemon closes the pipe."""
    calls, answers = _take_pipes()
    _be_first_to_go()
    threading.Thread(target=_end_with_daemon, args=(calls.fileno(),), name="end-with-daemon", daemon=True).start()
    first = _receive(calls)
    if first is None:
        return
    setup, _ = first
    sys.path[:] = setup["sys_path"]
    try:
        serve = resolve(setup["service"])(setup["options"])
    except (DottedPathError, ServiceRefused) as error:
        _send(answers, {"error": error.message})
        return
    _send(answers, {})
    while (call := _receive(calls)) is not None:
        _send(answers, serve(*call))


def _take_pipes() -> tuple[BinaryIO, BinaryIO]:
    """The daemon's pipes under descriptors of our own, which programs started from here do not inherit.

    All other descriptors are closed: under uvloop a child has copies of its pipes, which would be inherited.
    """
    ours = (os.dup(0), os.dup(1))
    low, high = sorted(ours)
    for first, last in ((3, low), (low + 1, high), (high + 1, os.sysconf("SC_OPEN_MAX"))):
        os.closerange(first, last)
    calls, answers = os.fdopen(ours[0], "rb"), os.fdopen(ours[1], "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return calls, answers


def _be_first_to_go() -> None:
    """Tell the kernel whom to kill when memory runs out: one verifier of ``9**9**9`` must not cost the run."""
    with suppress(OSError):  # no /proc, or a container that allows no change
        Path("/proc/self/oom_score_adj").write_text("1000")


def _end_with_daemon(descriptor: int) -> None:
    """Kill this process and its group once nobody holds the other end of ``descriptor``."""
    poller = select.poll()
    poller.register(descriptor, 0)  # 0: hang-ups only, not data
    poller.poll()
    if os.getpgrp() != os.getpid():  # started by hand: the group is somebody else's
        os._exit(1)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _receive(stream: BinaryIO) -> tuple[dict[str, Any], bytes] | None:
    """The next message; ``None`` when the daemon has closed the pipe."""
    prefix = stream.read(PREFIX.size)
    if len(prefix) < PREFIX.size:
        return None
    header_bytes, data_bytes = PREFIX.unpack(prefix)
    return orjson.loads(stream.read(header_bytes)), stream.read(data_bytes)


def _send(stream: BinaryIO, header: dict[str, Any]) -> None:
    stream.write(encode_message(header))
    stream.flush()


if __name__ == "__main__":
    main()
