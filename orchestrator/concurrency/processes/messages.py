"""What goes through the pipes between the daemon and a process of a service.

A message is a prefix of two unsigned little-endian 32-bit lengths, one JSON object, and bytes::

    daemon → process  {"sys_path", "service", "options"}     once, at the start
    process → daemon  {} or {"error"}                        it is ready, or why it never will be
    daemon → process  a call                                 as the service wants it
    process → daemon  an answer                              without bytes

Invariants:

* Nothing but data goes through: no pickle, so that an answer cannot run code in the daemon.
"""

from __future__ import annotations

import struct
from typing import Any, Final

import orjson

from orchestrator.errors import OrchestratorError

__all__ = ["MAX_ANSWER_BYTES", "PREFIX", "ProcessFailed", "ProcessTimeout", "ServiceRefused", "encode_message"]

PREFIX: Final = struct.Struct("<II")

MAX_ANSWER_BYTES: Final = 32 << 20
"""32 MiB: the rewards of a group of 1,024 samples with details of the largest size, or a prompt of the largest row."""


class ProcessFailed(OrchestratorError, RuntimeError):
    """The process of a service ended, or what it sent is not an answer; the process is of no use any more."""

    code = "process_failed"


class ProcessTimeout(ProcessFailed, TimeoutError):
    """The process of a service was not ready, or had no answer, within its deadline; it was killed."""

    code = "process_timeout"


class ServiceRefused(ProcessFailed, ValueError):
    """A service cannot serve what it was set up for; the message is the service's own."""

    code = "service_refused"


def encode_message(header: dict[str, Any], data: bytes = b"") -> bytes:
    """One message.

    Raises:
        TypeError: the header holds something that JSON cannot say.
    """
    text = orjson.dumps(header)
    return b"".join((PREFIX.pack(len(text), len(data)), text, data))
