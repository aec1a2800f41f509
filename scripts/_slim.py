"""Cut debug information off the compiled files of an environment: python scripts/_slim.py .venv

A third of what a first run installs would be debug information of llama.cpp's package. It lies behind the last segment
that the loader maps, so that the file can end there: what `strip` of binutils does, which not every machine has.

Invariants:

* Only 64-bit little-endian ELF shared libraries are touched, and of these nothing that is mapped.
* Each file is replaced at one go, and a second run finds nothing to do.
"""

from __future__ import annotations

import mmap
import os
import struct
import sys
from pathlib import Path

WORTH_BYTES = 1 << 20
"""Smaller files are left alone."""

ELF64_LITTLE = b"\x7fELF\x02\x01"
HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
"""Of an ELF file (System V ABI, chapter 4): its 6th field is where the segments are listed, its 7th the sections."""

SEGMENT = struct.Struct("<IIQQQQQQ")


def end_of_segments(data: bytes | mmap.mmap) -> int:
    """Where the last byte is that a segment needs, plus one; 0 for a file that is not to be touched."""
    if len(data) < HEADER.size or data[:6] != ELF64_LITTLE:
        return 0
    *_, table, _sections, _flags, _size, entry_size, entries, _, _, _ = HEADER.unpack_from(data)
    if entry_size != SEGMENT.size or table + entries * entry_size > len(data):
        return 0
    segments = (SEGMENT.unpack_from(data, table + number * entry_size) for number in range(entries))
    ends = [offset + in_file for _, _, offset, _, _, in_file, _, _ in segments]
    return max([table + entries * entry_size, *ends])


def slim(path: Path) -> int:
    """Shorten one file; returns by how many bytes."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        end = end_of_segments(data)
        if not HEADER.size < end < len(data):
            return 0
        fields = list(HEADER.unpack_from(data))
        fields[6] = fields[12] = fields[13] = 0  # no list of sections, no entries, no names of them
        shorter, saved = path.with_suffix(".slim"), len(data) - end
        shorter.write_bytes(HEADER.pack(*fields) + data[HEADER.size : end])
    shorter.chmod(path.stat().st_mode)
    os.replace(shorter, path)
    return saved


def main(environment: Path) -> None:
    """All compiled files of an environment."""
    files = [p for p in environment.rglob("*.so*") if p.is_file() and not p.is_symlink()]
    saved = sum(slim(path) for path in files if path.stat().st_size >= WORTH_BYTES)
    if saved:
        print(f"cut {saved >> 20} MB of debug information off the compiled packages", file=sys.stderr)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
