r"""The log's files: numbered segments of checksummed records.

Layout of a segment (little-endian)::

    0   8  b"ROLLOG\x00\x01": the last byte is the format version
    8   8  segment number
    16  …  records

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

from orchestrator.buffer import Place
from orchestrator.errors import CorruptState

__all__ = [
    "MOVED_HEADER_BYTES",
    "RECORD_PREFIX_BYTES",
    "SEGMENT_HEADER_BYTES",
    "Damage",
    "Record",
    "RecordKind",
    "Segment",
    "decode_moved",
    "encode_moved",
    "encode_prefix",
    "list_segments",
    "segment_header",
    "segment_path",
]

SEGMENT_MAGIC: Final = b"ROLLOG\x00\x01"
SEGMENT_HEADER_BYTES: Final = 16
RECORD_MAGIC: Final = b"RL"
RECORD_PREFIX_BYTES: Final = 16

_PREFIX = struct.Struct("<2sBBIQ")
_MOVED = struct.Struct("<QQQ")
MOVED_HEADER_BYTES: Final = _MOVED.size
_SEGMENT_NAME = re.compile(r"log-(\d{8})\.rol")


class RecordKind(IntEnum):
    """What a record's body is; numbers are never given to another meaning."""

    EVENT = 1
    """A JSON event (``orchestrator.events``)."""
    GROUP = 2
    """The frame of a finished group."""
    PARTIAL = 3
    """A partial frame (``orchestrator.partials``)."""
    MOVED = 4
    """24 bytes of the old place, then a frame that was copied here by compaction."""


class Record(NamedTuple):
    """One record: its kind, where its body lies, and the body."""

    kind: RecordKind
    place: Place
    body: memoryview


class Damage(NamedTuple):
    """Where reading a segment ended before its end: byte offset, bytes left unread, and why."""

    offset: int
    lost_bytes: int
    reason: str


def segment_path(directory: Path, number: int) -> Path:
    """The file of a segment."""
    return directory / f"log-{number:08d}.rol"


def list_segments(directory: Path) -> list[int]:
    """Numbers of the segments in a directory, ascending."""
    return sorted(int(m[1]) for name in os.listdir(directory) if (m := _SEGMENT_NAME.fullmatch(name)))


def segment_header(number: int) -> bytes:
    """The first 16 bytes of a segment."""
    return SEGMENT_MAGIC + struct.pack("<Q", number)


def _checksum(kind: int, length: int, body: bytes | memoryview) -> int:
    crc = google_crc32c.value(struct.pack("<QB", length, kind))
    return int(google_crc32c.extend(crc, bytes(body) if isinstance(body, memoryview) else body))


def encode_prefix(kind: RecordKind, body: bytes) -> bytes:
    """The 16 bytes that stand before a body."""
    return _PREFIX.pack(RECORD_MAGIC, kind, 0, _checksum(kind, len(body), body), len(body))


class Segment:
    """One segment, mapped for reading; frames taken from it stay valid for as long as they are referenced.

    Raises:
        CorruptState: not a segment of this format version, or of another number.
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
        if bytes(self.view[:SEGMENT_HEADER_BYTES]) != segment_header(number):
            raise CorruptState(f"{self.path} is not log segment {number} of format 1")

    def _read(self, offset: int) -> Record | str | None:
        """The record at ``offset``; a sentence if it is damaged; ``None`` at the end of the segment."""
        view = self.view
        if offset == len(view):
            return None
        if offset + RECORD_PREFIX_BYTES > len(view):
            return "a record's prefix is cut off"
        magic, kind, _, crc, length = _PREFIX.unpack_from(view, offset)
        if magic != RECORD_MAGIC:
            return "no record begins here"
        begin = offset + RECORD_PREFIX_BYTES
        if length > len(view) - begin:
            return f"a record of {length} bytes is cut off after {len(view) - begin}"
        body = view[begin : begin + length]
        if _checksum(kind, length, body) != crc:
            return "a record fails its checksum"
        if kind not in RecordKind._value2member_map_:
            return f"a record of unknown kind {kind}"
        return Record(RecordKind(kind), Place(self.number, begin, length), body)

    def records(self, offset: int = SEGMENT_HEADER_BYTES) -> Iterator[Record | Damage]:
        """The records from ``offset`` on; a :class:`Damage` as the last item where reading had to end early."""
        while (record := self._read(offset)) is not None:
            if isinstance(record, str):
                yield Damage(offset, len(self.view) - offset, record)
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
            raise CorruptState(f"{self.path}, offset {place.offset}: {record or 'nothing there'}")
        return record.body[MOVED_HEADER_BYTES:] if record.kind is RecordKind.MOVED else record.body


def encode_moved(old: Place, frame: bytes | memoryview) -> bytes:
    """Body of a ``MOVED`` record."""
    return b"".join((_MOVED.pack(*old), frame))


def decode_moved(record: Record) -> tuple[Place, memoryview]:
    """The old place and the frame of a ``MOVED`` record."""
    return Place(*_MOVED.unpack_from(record.body)), record.body[MOVED_HEADER_BYTES:]
