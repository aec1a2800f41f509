"""The frame codec: one layout for the socket, the disk and the client alike.

A frame is a 16-byte prefix, a JSON header, a payload (``docs/protocol.md`` is the normative description)::

    0   4  b"ROL1"
    4   4  header length H, unsigned little-endian, at most MAX_HEADER_BYTES
    8   8  payload length P, unsigned little-endian
    16  H  header: one JSON object, UTF-8
    …   P  payload

Invariants:

* Frames made here are padded (headers with spaces, payloads with zeros): 16 + H and P are multiples of 8, so that the
  columns of a group frame are aligned in memory whenever the frame is. Frames read here need not be padded.
* A group frame is encoded once, when its group is finished; buffer, disk and socket pass the same bytes on.
* Nothing is allocated for a length that has not been checked; everything that is wrong raises
  :class:`~orchestrator.errors.FrameError`.
* Standard library and numpy only; ``orjson`` is used where it is installed.
"""

from __future__ import annotations

import json
import struct
from array import array
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from .errors import FrameError
from .records import Group, Sample

try:
    from orjson import dumps as _dumps
    from orjson import loads as _loads
except ImportError:  # a trainer's environment may have numpy only

    def _dumps(value: Any, /) -> bytes:  # type: ignore[misc]
        return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()

    def _refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not JSON")

    def _loads(text: bytes, /) -> Any:  # type: ignore[misc]
        return json.loads(text.decode(), parse_constant=_refuse)  # bytes would be taken for UTF-16 or UTF-32 as well


__all__ = [
    "DEFAULT_MAX_PAYLOAD_BYTES",
    "MAGIC",
    "MAX_HEADER_BYTES",
    "MAX_INLINE_JSON_BYTES",
    "PREFIX_BYTES",
    "GroupFrame",
    "Prefix",
    "encode_frame",
    "encode_group",
    "iter_group_frames",
    "parse_header",
    "parse_prefix",
]

MAGIC: Final = b"ROL1"
PREFIX_BYTES: Final = 16

MAX_HEADER_BYTES: Final = 1 << 20
"""1 MiB: a status answer of hundreds of sources fits; a hostile length does not make the reader allocate more."""

DEFAULT_MAX_PAYLOAD_BYTES: Final = 4 << 30
"""4 GiB: the largest batch that ``hello`` announces unless configured otherwise."""

MAX_INLINE_JSON_BYTES: Final = 64 << 10
"""64 KiB: a larger ``prompt``, ``label`` or ``metadata`` moves from the header to a U8 column of its name."""

_PREFIX = struct.Struct("<4sIQ")

_DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "I16": np.dtype("<i2"),
    "U16": np.dtype("<u2"),
    "F16": np.dtype("<f2"),
    "I32": np.dtype("<i4"),
    "U32": np.dtype("<u4"),
    "F32": np.dtype("<f4"),
    "I64": np.dtype("<i8"),
    "U64": np.dtype("<u8"),
    "F64": np.dtype("<f8"),
}
"""safetensors' names of little-endian dtypes that numpy has."""

_ITEM_BYTES: Final = {name: dtype.itemsize for name, dtype in _DTYPES.items()}


def _known(column: str, dtype: str) -> np.dtype[Any]:
    if dtype not in _DTYPES:
        raise FrameError(f"column {column} has the dtype {dtype!r}, known are {', '.join(_DTYPES)}")
    return _DTYPES[dtype]


class Prefix(NamedTuple):
    """The two lengths of a frame, in bytes."""

    header_bytes: int
    payload_bytes: int

    @property
    def frame_bytes(self) -> int:
        """Length of the whole frame."""
        return PREFIX_BYTES + self.header_bytes + self.payload_bytes


def parse_prefix(prefix: bytes | bytearray | memoryview, max_payload: int = DEFAULT_MAX_PAYLOAD_BYTES) -> Prefix:
    """Read the first 16 bytes of a frame and check its lengths against the limits.

    Raises:
        FrameError: wrong magic, or a length above its limit.
    """
    if len(prefix) < PREFIX_BYTES:
        raise FrameError(f"a frame begins with {PREFIX_BYTES} bytes, got {len(prefix)}")
    magic, header_bytes, payload_bytes = _PREFIX.unpack_from(prefix)
    if magic != MAGIC:
        raise FrameError(f"a frame begins with {MAGIC!r}, got {bytes(magic)!r}")
    if header_bytes > MAX_HEADER_BYTES:
        raise FrameError(f"header of {header_bytes} bytes, at most {MAX_HEADER_BYTES} are allowed")
    if payload_bytes > max_payload:
        raise FrameError(f"payload of {payload_bytes} bytes, at most {max_payload} are allowed")
    return Prefix(header_bytes, payload_bytes)


def parse_header(header: bytes | bytearray | memoryview) -> dict[str, Any]:
    """Parse the JSON object of a frame's header.

    Raises:
        FrameError: not UTF-8, not JSON, or not an object.
    """
    try:
        value = _loads(header if isinstance(header, bytes) else bytes(header))
    except (ValueError, RecursionError) as error:
        raise FrameError(f"the header is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise FrameError(f"the header is a JSON {type(value).__name__}, an object is expected")
    return value


def _json_bytes(name: str, value: Any) -> bytes:
    try:
        return _dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise FrameError(f"{name} cannot be written as JSON: {error}") from error


def encode_frame(header: dict[str, Any], payload_bytes: int = 0) -> bytes:
    """The prefix and padded header of a frame whose payload of ``payload_bytes`` follows separately.

    Raises:
        FrameError: the header is above its limit, or holds something that JSON cannot say.
    """
    text = _json_bytes("the header", header)
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise FrameError(f"header of {len(text)} bytes, at most {MAX_HEADER_BYTES} are allowed")
    return _PREFIX.pack(MAGIC, len(text), payload_bytes) + text


# -- group frames -----------------------------------------------------------------------------------------------------


class _Columns:
    """Collects the columns of a payload, each beginning at a multiple of 8."""

    def __init__(self) -> None:
        self.index: dict[str, tuple[str, int, int]] = {}
        self.parts: list[bytes | array[int] | array[float]] = []
        self.size = 0

    def add(self, name: str, dtype: str, data: bytes | array[int] | array[float]) -> None:
        size = len(data) * (data.itemsize if isinstance(data, array) else 1)
        self.index[name] = (dtype, self.size, self.size + size)
        self.parts.append(data)
        if padding := -size % 8:
            self.parts.append(bytes(padding))
        self.size += size + padding


def _offsets(lengths: Sequence[int]) -> array[int]:
    """Running sums with a leading zero: ``[n+1]`` int64."""
    offsets = array("q", [0])
    total = 0
    for length in lengths:
        total += length
        offsets.append(total)
    return offsets


def _sample_header(sample: Sample) -> dict[str, Any]:
    return {
        "index": sample.index,
        "status": sample.status.value,
        "reward": sample.reward,
        "versions": sample.versions,
        "finish_reason": sample.finish_reason,
        "metadata": sample.metadata,
    }


def _check_lengths(sample: Sample) -> None:
    for name, values in (("logprobs", sample.logprobs), ("loss_mask", sample.loss_mask)):
        if values is not None and len(values) != len(sample.tokens):
            raise FrameError(f"sample {sample.index}: {len(values)} {name} for {len(sample.tokens)} tokens")


def _loss_mask(samples: Sequence[Sample]) -> bytes:
    return b"".join(
        b"\x01" * len(sample.tokens) if sample.loss_mask is None else sample.loss_mask for sample in samples
    )


def encode_group(group: Group, **extra: Any) -> bytes:
    """One finished group as a whole frame: what is stored on disk and sent to the trainer, byte for byte.

    Columns (``n`` samples, ``P`` prompt tokens, ``T`` response tokens in all): ``prompt_tokens`` I32 [P],
    ``response_offsets`` I64 [n+1], ``response_tokens`` I32 [T], ``logprobs`` F32 [T] (absent unless every sample has
    them), ``loss_mask`` U8 [T], ``text_offsets`` I64 [n+1], ``text`` U8 (UTF-8).

    Args:
        group: the group; ``loss_mask`` of each sample is ``None`` or as long as its tokens.
        extra: further header keys; readers ignore those they do not know.

    Raises:
        FrameError: something in the group cannot be written as JSON, a log-probability or mask is not as long as its
            sample's tokens, or the header is too large.
    """
    samples = group.samples
    for sample in samples:
        _check_lengths(sample)
    columns = _Columns()
    columns.add("prompt_tokens", "I32", group.prompt_tokens)
    columns.add("response_offsets", "I64", _offsets([len(sample.tokens) for sample in samples]))
    tokens = array("i")
    for sample in samples:
        tokens.extend(sample.tokens)
    columns.add("response_tokens", "I32", tokens)
    if all(sample.logprobs is not None for sample in samples):
        logprobs = array("f")
        for sample in samples:
            logprobs.extend(sample.logprobs or ())
        columns.add("logprobs", "F32", logprobs)
    columns.add("loss_mask", "U8", _loss_mask(samples))
    texts = [sample.text.encode("utf-8", "replace") for sample in samples]
    columns.add("text_offsets", "I64", _offsets([len(text) for text in texts]))
    columns.add("text", "U8", b"".join(texts))

    prompt = group.prompt
    header: dict[str, Any] = {
        "source": group.source,
        "group_index": group.group_index,
        "prompt_index": prompt.prompt_index,
        "epoch": prompt.epoch,
        "n": len(samples),
    }
    large: dict[str, Any] = {"prompt": prompt.content, "label": prompt.label, "metadata": prompt.metadata}
    for name, value in large.items():
        text = _json_bytes(name, value)
        if len(text) > MAX_INLINE_JSON_BYTES:
            columns.add(name, "U8", text)
        else:
            header[name] = value
    header["sampling"] = group.sampling
    header["logprobs"] = group.logprobs_kind
    header["samples"] = [_sample_header(sample) for sample in samples]
    header.update(extra)
    header["columns"] = columns.index
    return b"".join((encode_frame(header, columns.size), *columns.parts))


class GroupFrame:
    """A group frame in memory, read without copying.

    ``header`` is parsed at construction; columns are numpy views into ``buffer``, made when asked for.

    Raises:
        FrameError: at construction, if the buffer is not one whole frame with well-formed columns.
    """

    __slots__ = ("_payload", "buffer", "header")

    def __init__(self, buffer: bytes | bytearray | memoryview) -> None:
        view = memoryview(buffer)
        prefix = parse_prefix(view)
        if len(view) != prefix.frame_bytes:
            raise FrameError(f"a frame of {prefix.frame_bytes} bytes was announced, {len(view)} are there")
        self.buffer = view
        begin = PREFIX_BYTES + prefix.header_bytes
        self.header: dict[str, Any] = parse_header(view[PREFIX_BYTES:begin])
        self._payload = view[begin:]
        self._check_columns(prefix.payload_bytes)

    def _check_columns(self, size: int) -> None:
        columns = self.header.get("columns")
        if type(columns) is not dict:
            raise FrameError("a group frame has a `columns` object")
        for name, entry in columns.items():
            if type(entry) is not list or len(entry) != 3 or type(entry[0]) is not str:
                raise FrameError(f"column {name}: [dtype, begin, end] is expected")
            dtype, begin, end = entry
            if type(begin) is not int or type(end) is not int or not 0 <= begin <= end <= size:
                raise FrameError(f"column {name}: bytes {begin} to {end} are not inside a payload of {size}")
            if (end - begin) % _ITEM_BYTES.get(dtype, 1):
                raise FrameError(f"column {name}: {end - begin} bytes are not a whole number of {dtype}")

    def __contains__(self, name: str) -> bool:
        return name in self.header["columns"]

    def length(self, name: str) -> int:
        """Number of entries of the column of that name; raises as :meth:`column`."""
        dtype, begin, end = self.header["columns"][name]
        length: int = (end - begin) // _known(name, dtype).itemsize
        return length

    def column(self, name: str) -> np.ndarray[Any, Any]:
        """The column of that name as a one-dimensional view.

        Raises:
            KeyError: the frame has no such column.
            FrameError: its dtype is not known here.
        """
        dtype, begin, end = self.header["columns"][name]
        kind = _known(name, dtype)
        # A third of what `frombuffer` takes, which is felt: a batch has hundreds of columns.
        return np.ndarray((end - begin) // kind.itemsize, kind, self._payload, begin)

    def integers(self, name: str) -> list[int]:
        """An I64 column as a list: for short ones, of which Python computes faster."""
        _, begin, end = self.header["columns"][name]
        return list(struct.unpack_from(f"<{(end - begin) // 8}q", self._payload, begin))

    def json(self, name: str) -> Any:
        """``prompt``, ``label`` or ``metadata``, from the header or from the U8 column that stands in for it.

        Raises:
            FrameError: the column is not JSON.
        """
        if name in self.header or name not in self:
            return self.header.get(name)
        try:
            return _loads(self.column(name).tobytes())
        except (ValueError, RecursionError) as error:
            raise FrameError(f"column {name} is not JSON: {error}") from None


def iter_group_frames(payload: bytes | bytearray | memoryview) -> Iterator[GroupFrame]:
    """The group frames of a batch payload, one after the other.

    Raises:
        FrameError: bytes that are not frames, or are left over.
    """
    view = memoryview(payload)
    while view:
        prefix = parse_prefix(view)
        if len(view) < prefix.frame_bytes:
            raise FrameError(f"a group frame of {prefix.frame_bytes} bytes is cut off after {len(view)}")
        yield GroupFrame(view[: prefix.frame_bytes])
        view = view[prefix.frame_bytes :]
