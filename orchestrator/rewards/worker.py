"""The process in which a user's synchronous reward function runs: ``python -m orchestrator.rewards.worker``.

Invariants:

* One function a process, one call at a time, in the main thread (so that ``signal.alarm`` works in it).
* Standard input and output belong to the daemon and are moved out of the way before any user code is imported:
  what the function, or a program that it starts, prints goes to standard error and cannot spoil an answer.
* The process ends with the daemon, even in the middle of a call, and takes the processes that it started with it.
* It may be killed at any time and has nothing to save.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from orchestrator.dotted import resolve
from orchestrator.errors import DottedPathError, RewardError

from .verdict import describe_exception, to_result
from .wire import PREFIX, decode_call, encode_message

__all__ = ["main"]


def main() -> None:
    """Serve calls until the daemon closes the pipe."""
    calls, answers = _take_pipes()
    threading.Thread(target=_end_with_daemon, args=(calls.fileno(),), name="end-with-daemon", daemon=True).start()
    first = _receive(calls)
    if first is None:
        return
    setup, _ = first
    sys.path[:] = setup["sys_path"]
    directory = setup["directory"]
    try:
        function = resolve(setup["function"], directory=None if directory is None else Path(directory))
    except DottedPathError as error:
        _send(answers, {"error": error.message})
        return
    _send(answers, {})
    while (call := _receive(calls)) is not None:
        header, data = call
        sample, prompt = decode_call(header, data)
        try:
            result = to_result(setup["function"], function(sample, prompt), setup["key"])
        except RewardError as error:
            _send(answers, {"error": error.message})
        except Exception as error:  # noqa: BLE001 - whatever user code raises is its answer
            _send(answers, {"error": f"reward {setup['function']}: it raised {describe_exception(error)}"})
        else:
            _send(answers, {"value": result.value, "detail": result.detail})


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
