"""The call of a reward function as a message of the pipes to its worker process (``concurrency.processes``).

Invariants:

* The function sees the whole samples and prompt, token arrays included; those travel as bytes, not as JSON.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, Final

from orchestrator.concurrency.processes.messages import encode_message
from orchestrator.records import Prompt, Sample, SampleStatus

__all__ = ["MAX_CALL_BYTES", "decode_call", "encode_call"]

MAX_CALL_BYTES: Final = 256 << 20
"""256 MiB: a prompt of the largest row that a file may have, and the samples of a group: 16 million tokens."""

_SAMPLE_ARRAYS: Final = (("tokens", "i"), ("logprobs", "f"), ("loss_mask", "B"))


def encode_call(samples: Sequence[Sample], prompt: Prompt) -> bytes:
    """The message that asks for the rewards of ``samples``.

    Raises:
        TypeError: something in the metadata or the label is not JSON.
        ValueError: the message would be larger than ``MAX_CALL_BYTES``.
    """
    arrays: list[bytes | None] = [None if prompt.tokens is None else array("i", prompt.tokens).tobytes()]
    for sample in samples:
        logprobs = None if sample.logprobs is None else sample.logprobs.tobytes()
        arrays += (sample.tokens.tobytes(), logprobs, sample.loss_mask)
    header = {
        "samples": [_sample_header(sample) for sample in samples],
        "prompt": {
            "source": prompt.source,
            "prompt_index": prompt.prompt_index,
            "epoch": prompt.epoch,
            "content": prompt.content,
            "label": prompt.label,
            "metadata": prompt.metadata,
        },
        "arrays": [None if data is None else len(data) for data in arrays],
    }
    message = encode_message(header, b"".join(data for data in arrays if data is not None))
    if len(message) > MAX_CALL_BYTES:
        raise ValueError(f"samples and prompt have {len(message)} bytes; at most {MAX_CALL_BYTES} can be scored")
    return message


def _sample_header(sample: Sample) -> dict[str, Any]:
    return {
        "index": sample.index,
        "versions": sample.versions,
        "text": sample.text,
        "status": sample.status.value,
        "finish_reason": sample.finish_reason,
        "metadata": sample.metadata,
    }


def decode_call(header: dict[str, Any], data: bytes) -> tuple[list[Sample], Prompt]:
    """The samples and prompt of a message made by :func:`encode_call`."""
    typecodes = ["i", *(typecode for _ in header["samples"] for _, typecode in _SAMPLE_ARRAYS)]
    arrays: list[Any] = []
    begin = 0
    for typecode, length in zip(typecodes, header["arrays"], strict=True):
        arrays.append(None if length is None else array(typecode, data[begin : begin + length]))
        begin += length or 0
    prompt = Prompt(**header["prompt"], tokens=arrays[0])
    samples = []
    for position, fields in enumerate(header["samples"]):
        tokens, logprobs, loss_mask = arrays[1 + 3 * position : 4 + 3 * position]
        mask = None if loss_mask is None else bytes(loss_mask)
        status = SampleStatus(fields["status"])
        samples.append(Sample(**{**fields, "status": status}, tokens=tokens, logprobs=logprobs, loss_mask=mask))
    return samples, prompt
