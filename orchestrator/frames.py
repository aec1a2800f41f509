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
from collections.abc import Sequence
from itertools import accumulate
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
        raise FrameError(f"column {column} has the dtype {dtype!r}; use one of {', '.join(_DTYPES)}")
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
        raise FrameError(f"a frame starts with {PREFIX_BYTES} bytes, got {len(prefix)}")
    magic, header_bytes, payload_bytes = _PREFIX.unpack_from(prefix)
    if magic != MAGIC:
        raise FrameError(f"a frame starts with {MAGIC!r}, got {bytes(magic)!r}")
    if header_bytes > MAX_HEADER_BYTES:
        raise FrameError(f"header of {header_bytes} bytes; at most {MAX_HEADER_BYTES} are allowed")
    if payload_bytes > max_payload:
        raise FrameError(f"payload of {payload_bytes} bytes; at most {max_payload} are allowed")
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
        raise FrameError(f"the header is a JSON {type(value).__name__}, but must be an object")
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
    return _frame_head(_json_bytes("the header", header), payload_bytes)


def _frame_head(text: bytes, payload_bytes: int) -> bytes:
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise FrameError(f"header of {len(text)} bytes; at most {MAX_HEADER_BYTES} are allowed")
    return _PREFIX.pack(MAGIC, len(text), payload_bytes) + text


# -- group frames -----------------------------------------------------------------------------------------------------


class _Columns:
    """Collects the columns of a payload, each beginning at a multiple of 8; their parts are copied once, at the end."""

    def __init__(self) -> None:
        self.index: dict[str, tuple[str, int, int]] = {}
        self.parts: list[bytes | array[Any]] = []
        self.size = 0

    def add(self, name: str, dtype: str, size: int, parts: Sequence[bytes | array[Any]]) -> None:
        """A column of ``size`` bytes, which those of ``parts`` are, one after the other."""
        self.index[name] = (dtype, self.size, self.size + size)
        self.parts += parts
        if padding := -size % 8:
            self.parts.append(bytes(padding))
        self.size += size + padding


def _offsets(lengths: Sequence[int]) -> array[int]:
    """Running sums with a leading zero: ``[n+1]`` int64."""
    return array("q", accumulate(lengths, initial=0))


def _checked_length(sample: Sample) -> int:
    """Tokens of the sample."""
    length = len(sample.tokens)
    for name, values in (("logprobs", sample.logprobs), ("loss_mask", sample.loss_mask)):
        if values is not None and len(values) != length:
            raise FrameError(f"sample {sample.index}: {len(values)} {name} for {length} tokens")
    return length


def _group_columns(group: Group) -> _Columns:
    columns, samples = _Columns(), group.samples
    lengths = [_checked_length(sample) for sample in samples]
    tokens = sum(lengths)
    columns.add("prompt_tokens", "I32", 4 * len(group.prompt_tokens), [group.prompt_tokens])
    columns.add("response_offsets", "I64", 8 * len(lengths) + 8, [_offsets(lengths)])
    columns.add("response_tokens", "I32", 4 * tokens, [sample.tokens for sample in samples])
    logprobs = [sample.logprobs for sample in samples if sample.logprobs is not None]
    if len(logprobs) == len(samples):
        columns.add("logprobs", "F32", 4 * tokens, logprobs)
    columns.add("loss_mask", "U8", tokens, [sample.mask() for sample in samples])
    texts = [sample.text.encode("utf-8", "replace") for sample in samples]
    text_offsets = _offsets([len(text) for text in texts])
    columns.add("text_offsets", "I64", 8 * len(texts) + 8, [text_offsets])
    columns.add("text", "U8", text_offsets[-1], texts)
    return columns


def _group_header(group: Group) -> dict[str, Any]:
    prompt = group.prompt
    return {
        "source": group.source,
        "group_index": group.group_index,
        "prompt_index": prompt.prompt_index,
        "epoch": prompt.epoch,
        "n": len(group.samples),
        "prompt": prompt.content,
        "label": prompt.label,
        "metadata": prompt.metadata,
        "sampling": group.sampling,
        "logprobs": group.logprobs_kind,
        "samples": [
            {
                "index": sample.index,
                "status": sample.status,
                "reward": sample.reward,
                "versions": sample.versions,
                "finish_reason": sample.finish_reason,
                "metadata": sample.metadata,
            }
            for sample in group.samples
        ],
    }


def _header_text(header: dict[str, Any], columns: _Columns) -> bytes:
    """The header as JSON; a ``prompt``, ``label`` or ``metadata`` that is too large becomes a column instead."""
    try:
        text = _dumps(header)
    except (TypeError, ValueError, RecursionError):
        text = None  # which of its parts that cannot be written is found out below
    if text is not None and len(text) <= MAX_INLINE_JSON_BYTES:  # then so is each of its parts
        return text
    for name in ("prompt", "label", "metadata"):
        value = _json_bytes(name, header[name])
        if len(value) > MAX_INLINE_JSON_BYTES:
            columns.add(name, "U8", len(value), [value])
            del header[name]
    return _json_bytes("the header", header)


def encode_group(group: Group, **extra: Any) -> bytes:
    """One finished group as a whole frame: what is stored on disk and sent to the trainer, byte for byte.

    Columns (``n`` samples, ``P`` prompt tokens, ``T`` response tokens in all): ``prompt_tokens`` I32 [P],
    ``response_offsets`` I64 [n+1], ``response_tokens`` I32 [T], ``logprobs`` F32 [T] (absent unless every sample has
    them), ``loss_mask`` U8 [T], ``text_offsets`` I64 [n+1], ``text`` U8 (UTF-8).

    Args:
        group: the group; ``loss_mask`` of each sample is ``None`` (see ``Sample.mask``) or as long as its tokens.
        extra: further header keys; readers ignore those they do not know.

    Raises:
        FrameError: something in the group cannot be written as JSON, a log-probability or mask is not as long as its
            sample's tokens, or the header is too large.
    """
    columns = _group_columns(group)
    header = _group_header(group) | extra | {"columns": columns.index}
    text = _header_text(header, columns)
    head = _frame_head(text, columns.size)
    frame = b"".join((head, *columns.parts))
    if len(frame) != len(head) + columns.size:
        raise FrameError(
            f"columns of {columns.size} bytes were written as {len(frame) - len(head)}: not int32 or float32"
        )
    return frame


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
            raise FrameError(f"the prefix announces a frame of {prefix.frame_bytes} bytes, got {len(view)}")
        self.buffer = view
        begin = PREFIX_BYTES + prefix.header_bytes
        self.header: dict[str, Any] = parse_header(view[PREFIX_BYTES:begin])
        self._payload = view[begin:]
        self._check_columns(prefix.payload_bytes)

    def _check_columns(self, size: int) -> None:
        columns = self.header.get("columns")
        if type(columns) is not dict:
            raise FrameError("a group frame needs a `columns` object")
        for name, entry in columns.items():
            if type(entry) is not list or len(entry) != 3 or type(entry[0]) is not str:
                raise FrameError(f"column {name}: expected [dtype, begin, end]")
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
