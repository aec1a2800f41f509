"""What goes through the pipes between the daemon and a reward's worker process.

A message is a prefix of two unsigned little-endian 32-bit lengths, one JSON object, and bytes::

    daemon → worker   {"sys_path", "function", "directory", "key"}               once, at the start
    worker → daemon   {} or {"error"}                                            the function is there, or why not
    daemon → worker   {"sample", "prompt", "arrays"} + bytes                     a call
    worker → daemon   {"value", "detail"} or {"error"}                           its answer

Invariants:

* Nothing but data goes through: no pickle, so that an answer cannot run code in the daemon.
* The function sees the whole sample and prompt, token arrays included; those travel as bytes, not as JSON.
"""

from __future__ import annotations

import struct
from array import array
from typing import Any, Final

import orjson

from orchestrator.records import Prompt, Sample, SampleStatus

__all__ = ["MAX_ANSWER_BYTES", "MAX_CALL_BYTES", "PREFIX", "decode_call", "encode_call", "encode_message"]

PREFIX: Final = struct.Struct("<II")

MAX_CALL_BYTES: Final = 256 << 20
"""256 MiB: a prompt of the largest row that a file may have, a response of a million tokens, and metadata."""

MAX_ANSWER_BYTES: Final = 1 << 20
"""1 MiB: a detail of the largest size and an error message fit many times."""

_ARRAYS: Final = (("tokens", "i"), ("logprobs", "f"), ("loss_mask", "B"), ("prompt_tokens", "i"))


def encode_message(header: dict[str, Any], data: bytes = b"") -> bytes:
    """One message.

    Raises:
        TypeError: the header holds something that JSON cannot say.
    """
    text = orjson.dumps(header)
    return b"".join((PREFIX.pack(len(text), len(data)), text, data))


def encode_call(sample: Sample, prompt: Prompt) -> bytes:
    """The message that asks for the reward of ``sample``.

    Raises:
        TypeError: something in the metadata or the label is not JSON.
        ValueError: the message would be larger than ``MAX_CALL_BYTES``.
    """
    arrays: dict[str, bytes | None] = {
        "tokens": sample.tokens.tobytes(),
        "logprobs": None if sample.logprobs is None else sample.logprobs.tobytes(),
        "loss_mask": sample.loss_mask,
        "prompt_tokens": None if prompt.tokens is None else array("i", prompt.tokens).tobytes(),
    }
    header = {
        "sample": {
            "index": sample.index,
            "versions": sample.versions,
            "text": sample.text,
            "status": sample.status.value,
            "finish_reason": sample.finish_reason,
            "metadata": sample.metadata,
        },
        "prompt": {
            "source": prompt.source,
            "prompt_index": prompt.prompt_index,
            "epoch": prompt.epoch,
            "content": prompt.content,
            "label": prompt.label,
            "metadata": prompt.metadata,
        },
        "arrays": {name: None if data is None else len(data) for name, data in arrays.items()},
    }
    message = encode_message(header, b"".join(data for data in arrays.values() if data is not None))
    if len(message) > MAX_CALL_BYTES:
        raise ValueError(f"sample and prompt are {len(message)} bytes, at most {MAX_CALL_BYTES} can be scored")
    return message


def decode_call(header: dict[str, Any], data: bytes) -> tuple[Sample, Prompt]:
    """The sample and prompt of a message made by :func:`encode_call`."""
    arrays: dict[str, Any] = {}
    begin = 0
    for name, typecode in _ARRAYS:
        length = header["arrays"][name]
        if length is None:
            arrays[name] = None
            continue
        arrays[name] = array(typecode, data[begin : begin + length])
        begin += length
    loss_mask = arrays["loss_mask"]
    fields = {**header["sample"], "status": SampleStatus(header["sample"]["status"])}
    sample = Sample(
        **fields,
        tokens=arrays["tokens"],
        logprobs=arrays["logprobs"],
        loss_mask=None if loss_mask is None else bytes(loss_mask),
    )
    return sample, Prompt(**header["prompt"], tokens=arrays["prompt_tokens"])
