"""The group frames of a batch's payload, one after the other: what the client does lazily, in its plainest form."""

from __future__ import annotations

from collections.abc import Iterator

from orchestrator.errors import FrameError
from orchestrator.frames import GroupFrame, parse_prefix


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
