"""How old work is, in policy versions.

Invariants:

* Staleness is the current policy version minus the oldest version that produced a token; it is never negative.
* Tokens that no policy produced (``NO_VERSION``: tool and user turns) make nothing stale and are never trained on.
"""

from __future__ import annotations

from typing import Final

from orchestrator.records import NO_VERSION, Versions

__all__ = ["STALE", "is_stale", "newest_version", "offpolicy_mask", "staleness"]

STALE: Final = "stale"
"""The reason under which groups count that are too old; their prompts run again."""


def staleness(current: int, oldest: int | None) -> int:
    """Policy versions between ``oldest`` and ``current``; 0 where no policy produced a token.

    It is 0 as well for work that is newer than ``current``: loading a checkpoint sets the version back.
    """
    return 0 if oldest is None else max(0, current - oldest)


def is_stale(current: int, oldest: int | None, bound: int | None) -> bool:
    """Whether work is older than ``bound`` policy versions; ``None``: no bound, nothing is ever stale."""
    return bound is not None and staleness(current, oldest) > bound


def newest_version(versions: Versions) -> int | None:
    """The version of the newest token that a policy produced; ``None``: there is none."""
    return next((version for version, _ in reversed(versions) if version != NO_VERSION), None)


def offpolicy_mask(versions: Versions, keep_version: int) -> bytes:
    """A loss mask ``[T]`` of bytes: 1 for tokens of exactly ``keep_version``, 0 for all others.

    ``NO_VERSION`` tokens are 0 whatever is kept.
    """
    return b"".join(
        (b"\x01" if version == keep_version != NO_VERSION else b"\x00") * count for version, count in versions
    )
