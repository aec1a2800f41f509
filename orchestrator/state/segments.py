r"""The log's files: numbered segments of checksummed records.

Layout of a segment (little-endian)::

    0   7  b"ROLLOG\x00"
    7   1  format version
    8   8  segment number
    16  …  records; since version 2 the first one is a ``CONTINUES``, but for a log's very first segment

and of a record, which begins at a multiple of 8::

    0   2  b"RL"
    2   1  kind (``RecordKind``)
    3   1  zero
    4   4  CRC32C of the 8 bytes of length, the kind and the body
    8   8  length of the body in bytes
    16  …  body, padded with zeros to a multiple of 8

Invariants:

* A record is read back only if its checksum holds; whatever does not is reported with its place, never used.
* Frames keep their alignment: a body begins at a multiple of 8, so a mapped frame's columns are aligned.
"""

from __future__ import annotations

import mmap
import os
import re
import struct
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path
from typing import Final, NamedTuple

import google_crc32c

from orchestrator.core.ledger.groups import Place
from orchestrator.errors import CorruptState, StateError

__all__ = [
    "MOVED_HEADER_BYTES",
    "RECORD_PREFIX_BYTES",
    "SEGMENT_HEADER_BYTES",
    "Damage",
    "LogPosition",
    "Record",
    "RecordKind",
    "Segment",
    "decode_continues",
    "decode_moved",
    "encode_continues",
    "encode_moved",
    "encode_prefix",
    "list_segments",
    "segment_header",
    "segment_path",
]

SEGMENT_MAGIC: Final = b"ROLLOG\x00"
FORMAT: Final = 2
READABLE_FORMATS: Final = (1, 2)
"""2 has ``CONTINUES`` records: a segment that lost its end is known by the one after it."""

SEGMENT_HEADER_BYTES: Final = 16
RECORD_MAGIC: Final = b"RL"
RECORD_PREFIX_BYTES: Final = 16

_PREFIX = struct.Struct("<2sBBIQ")
_MOVED = struct.Struct("<QQQ")
_CONTINUES = struct.Struct("<QQ")
MOVED_HEADER_BYTES: Final = _MOVED.size
_SEGMENT_NAME = re.compile(r"log-(\d{8})\.rol")


class LogPosition(NamedTuple):
    """A place between two records: segment number and byte offset."""

    segment: int
    offset: int


class RecordKind(IntEnum):
    """What a record's body is; numbers are never given to another meaning."""

    EVENT = 1
    """A JSON event (``orchestrator.core.ledger.events``)."""
    GROUP = 2
    """The frame of a finished group."""
    PARTIAL = 3
    """A partial frame (``orchestrator.core.ledger.partials``)."""
    MOVED = 4
    """24 bytes of the old place, then a frame that was copied here by compaction."""
    CONTINUES = 5
    """Number (u64) and length in bytes (u64) of the segment before this one."""


class Record(NamedTuple):
    """One record: its kind, where its body lies, and the body.

    ``is_blemished``: bytes around it that hold nothing are not zero, as they were written.
    """

    kind: RecordKind
    place: Place
    body: memoryview
    is_blemished: bool = False


class Damage(NamedTuple):
    """Where reading a segment ended before its end: byte offset and why."""

    offset: int
    reason: str


def segment_path(directory: Path, number: int) -> Path:
    """The file of a segment."""
    return directory / f"log-{number:08d}.rol"


def list_segments(directory: Path) -> list[int]:
    """Numbers of the segments in a directory, ascending."""
    return sorted(int(m[1]) for name in os.listdir(directory) if (m := _SEGMENT_NAME.fullmatch(name)))


def segment_header(number: int, version: int = FORMAT) -> bytes:
    """The first 16 bytes of a segment."""
    return SEGMENT_MAGIC + struct.pack("<BQ", version, number)


def _checksum(kind: int, length: int, body: bytes | memoryview) -> int:
    crc = google_crc32c.value(struct.pack("<QB", length, kind))
    return int(google_crc32c.extend(crc, bytes(body) if isinstance(body, memoryview) else body))


def encode_prefix(kind: RecordKind, body: bytes) -> bytes:
    """The 16 bytes that stand before a body."""
    return _PREFIX.pack(RECORD_MAGIC, kind, 0, _checksum(kind, len(body), body), len(body))


class Segment:
    """One segment, mapped for reading; frames taken from it stay valid for as long as they are referenced.

    Raises:
        CorruptState: not a segment, or that of another number.
        StateError: of a format that this version does not read.
    """

    def __init__(self, directory: Path, number: int) -> None:
        self.number = number
        self.path = segment_path(directory, number)
        with self.path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < SEGMENT_HEADER_BYTES:
                # a crash between creating the file and writing its header: nothing was ever in it
                self.view = memoryview(b"")
                return
            self.view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        self._check_header(bytes(self.view[:SEGMENT_HEADER_BYTES]))

    def _check_header(self, header: bytes) -> None:
        magic, version = header[: len(SEGMENT_MAGIC)], header[len(SEGMENT_MAGIC)]
        if magic == SEGMENT_MAGIC and version not in READABLE_FORMATS:
            raise StateError(
                f"{self.path} is of format {version}, this version reads formats up to {FORMAT}: start the version that"
                " wrote it, or begin anew in another run.state_dir"
            )
        if header != segment_header(self.number, version):
            raise CorruptState(f"{self.path.name} does not start like log segment {self.number}")

    def _read(self, offset: int) -> Record | str | None:
        """The record at ``offset``; a sentence if it is damaged; ``None`` at the end of the segment."""
        view = self.view
        if offset == len(view):
            return None
        if offset + RECORD_PREFIX_BYTES > len(view):
            return "a record's prefix is cut off"
        magic, kind, spare, crc, length = _PREFIX.unpack_from(view, offset)
        if magic != RECORD_MAGIC:
            return "no record starts here"
        begin = offset + RECORD_PREFIX_BYTES
        if length > len(view) - begin:
            return f"a record of {length} bytes is cut off after {len(view) - begin}"
        body = view[begin : begin + length]
        if _checksum(kind, length, body) != crc:
            return "a record fails its checksum"
        if kind not in RecordKind._value2member_map_:
            return f"a record of unknown kind {kind}"
        padding = bytes(view[begin + length : begin + length + -length % 8])
        return Record(RecordKind(kind), Place(self.number, begin, length), body, bool(spare or any(padding)))

    def records(self, offset: int = SEGMENT_HEADER_BYTES) -> Iterator[Record | Damage]:
        """The records from ``offset`` on; a :class:`Damage` as the last item where reading had to end early."""
        while (record := self._read(offset)) is not None:
            if isinstance(record, str):
                yield Damage(offset, record)
                return
            yield record
            offset = min(record.place.offset + record.place.length + -record.place.length % 8, len(self.view))

    def frame(self, place: Place) -> memoryview:
        """The body at a place.

        Raises:
            CorruptState: it fails its checksum or is not there.
        """
        record = self._read(place.offset - RECORD_PREFIX_BYTES)
        if not isinstance(record, Record):
            raise CorruptState(f"{self.path.name}, offset {place.offset}: {record or 'nothing is there'}")
        if record.place != place or record.kind is RecordKind.EVENT:
            raise CorruptState(f"{self.path.name}, offset {place.offset}: there is another record")
        return record.body[MOVED_HEADER_BYTES:] if record.kind is RecordKind.MOVED else record.body


def encode_moved(old: Place, frame: bytes | memoryview) -> bytes:
    """Body of a ``MOVED`` record."""
    return b"".join((_MOVED.pack(*old), frame))


def decode_moved(record: Record) -> tuple[Place, memoryview]:
    """The old place and the frame of a ``MOVED`` record."""
    return Place(*_MOVED.unpack_from(record.body)), record.body[MOVED_HEADER_BYTES:]


def encode_continues(end: LogPosition) -> bytes:
    """Body of a ``CONTINUES`` record."""
    return _CONTINUES.pack(*end)


def decode_continues(record: Record) -> LogPosition:
    """Where the segment before this record's ended when this one was begun."""
    return LogPosition(*_CONTINUES.unpack(record.body))
