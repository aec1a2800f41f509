"""Which parameters an engine holds, as far as that is known.

Once a policy version is in force, an engine that may have been restarted since could answer with old parameters, and
its tokens would count under a version that did not produce them. So it gets no work until it is known to hold the
version: by its own report, or because the trainer says so (``set_policy_version``, ``update_weights``).

Invariants:

* Pure: probes and sayings in, verdict out.
* An engine's *identity* is what its probe says of its process and parameters. While it stays the same, so do they;
  when it changes, or cannot be told and the engine was unreachable for a while, they are unknown.
* A probe that began before the newest saying tells of the time before it, and so nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.engines.port import EngineInfo

__all__ = ["HeldParameters"]


@dataclass(slots=True)
class HeldParameters:
    """What one engine holds: ``version`` is ``None`` where that is unknown; ``sayings`` counts who said so.

    ``identity`` is of the time when the version became known; ``None``: the engine cannot tell, or the next probe will.
    """

    version: int | None = None
    identity: str | None = None
    sayings: int = 0
    _is_identity_due: bool = False

    def told(self, version: int) -> None:
        """The engine holds this version: somebody who knows says so."""
        self.version = version
        self.sayings += 1
        self._is_identity_due = True

    def lost(self) -> None:
        """It is not known any more what it holds."""
        self.version = None
        self.sayings += 1
        self._is_identity_due = False

    @property
    def is_settled(self) -> bool:
        """Whether version and identity belong together; otherwise the next probe will see to it."""
        return not self._is_identity_due

    def probed(self, info: EngineInfo, *, required: int | None, was_away: bool, asked_after: int | None = None) -> None:
        """A probe succeeded.

        Args:
            info: what the engine says of itself.
            required: the policy version in force; ``None``: none was ever set.
            was_away: it was unreachable for longer than a health check, or for all that we know.
            asked_after: ``sayings`` when the probe began; ``None``: nothing was said since.
        """
        if asked_after not in (None, self.sayings):
            return
        identity = _identity_of(info)
        if required is not None and info.policy_version == required and not self.is_current(required):
            self.version = required
        elif self.version is not None and not self._is_identity_due:
            is_same = identity == self.identity and not (identity is None and was_away)
            self.version = self.version if is_same else None
        self.identity = identity
        self._is_identity_due = False

    def is_current(self, required: int | None) -> bool:
        """Whether it may be given work."""
        return required is None or (self.version is not None and self.version >= required)


def _identity_of(info: EngineInfo) -> str | None:
    if info.instance is None and info.policy_version is None:
        return None
    return f"{info.instance or '-'} {'-' if info.policy_version is None else info.policy_version}"
