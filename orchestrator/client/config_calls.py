"""The calls of the client that change the config of a running daemon: reload, and sources.

Invariants:

* As of ``core``: no request is sent twice, every wait ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from .connecting import Connecting

__all__ = ["ConfigCalls"]

CHANGE_TIMEOUT_S: Final = 120.0
"""Prompt files are read wholly, and what is in flight is parked."""


class ConfigCalls(Connecting):
    """See the module's invariants; arguments as for :class:`~.connecting.Connecting`."""

    async def reload(self) -> dict[str, Any]:
        """Have the daemon read its config file again and take over what it can.

        Returns:
            ``changes``: for each key that differs ``key``, ``old``, ``new``, ``is_live`` (else it takes effect at the
            next start, and ``reason`` says why); and ``step``, of the first batch that they apply to.

        Raises:
            ConfigRefused: the file has problems, which the message lists; all is as it was.
            ShuttingDown: the daemon is draining.
        """
        return await self._call("reload", {}, CHANGE_TIMEOUT_S)

    async def sources(self) -> list[dict[str, Any]]:
        """Every source: ``source`` as a config file says it, ``weight``, ``cap``, ``state``.

        ``state`` is ``in_file``, ``added``, or ``removed`` (at run time; then without weight and cap).
        """
        return list((await self._call("sources", {}))["sources"])

    async def add_source(self, source: Mapping[str, Any], weight: float | str, cap: float | str | None = None) -> None:
        """One more source, as a config file says it; kept over restarts.

        Args:
            source: ``name``, ``prompts``, ``reward``, …
            weight: as ``data_source_weights`` says it.
            cap: as ``data_source_reward_caps`` says it.

        Raises:
            BadRequest: it would be wrong in a config file too, or its name is taken.
            ShuttingDown: the daemon is draining.
        """
        params = {"action": "add", "source": dict(source), "weight": weight, "cap": cap}
        await self._call("sources", params, CHANGE_TIMEOUT_S)

    async def remove_source(self, name: str) -> None:
        """Let a source go: what of it is in flight and buffered is dropped and counted. Kept over restarts.

        Raises:
            SourceUnknown: no such source.
            BadRequest: it is the last one, or the others cannot make batches.
        """
        await self._call("sources", {"action": "remove", "name": name}, CHANGE_TIMEOUT_S)

    async def restore_source(self, name: str) -> None:
        """Have a source of the file again that was removed at run time.

        Raises:
            BadRequest: none of that name was removed.
        """
        await self._call("sources", {"action": "restore", "name": name}, CHANGE_TIMEOUT_S)
