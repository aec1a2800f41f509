"""What a config says of an engine, and what the rest of the daemon may ask of it without knowing its kind.

Each kind has a subclass beside its adapter; ``kinds.py`` lists them.

Invariants:

* The keys of a spec, without ``kind``, are keyword parameters of its adapter, with the same defaults.
* ``name`` may be left out in a file; ``kinds.named`` gives every engine of a run the name under which it appears in
  logs.
* What differs between kinds and matters elsewhere is a property here. Nobody else asks which kind an engine is.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

from orchestrator.schema.fields import ServerUrl, key_variable, problem
from orchestrator.schema.kinds import Kind

from .port import Engine

__all__ = ["KEY_VARIABLE", "EngineName", "EngineSpec", "InFlight", "KeyVariable", "Logprobs", "ServerSpec"]

Logprobs = Literal["temperature", "raw"]
"""Which distribution an engine's log-probabilities are of; see ``orchestrator.engines.port.EngineInfo``."""

InFlight = Annotated[int, Field(ge=1, le=65_536)]


def _engine_name(value: str) -> str:
    if not value.isascii() or not value.isprintable() or not value or len(value) > 128 or set(value) & set(" /\"'\\"):
        raise problem(f"{value!r} cannot be a name", "use 1 to 128 ASCII characters without spaces, quotes or slashes")
    return value


EngineName = Annotated[str, AfterValidator(_engine_name)]

KeyVariable = Annotated[str, Field(pattern="^[A-Za-z_][A-Za-z0-9_]*$"), AfterValidator(key_variable)] | None

KEY_VARIABLE: Final = "Environment variable with the server's API key; null: no key is needed."


class EngineSpec(Kind):
    """An engine of a config; the keys ``kind`` and ``name`` are those of every kind."""

    if TYPE_CHECKING:
        name: str | None  # each kind declares it, where it belongs in its list of keys

    adapter: ClassVar[Callable[..., Engine]]
    """What :meth:`build` calls with the keys of the spec."""

    def build(self, *, workdir: Path) -> Engine:
        """The engine; nothing is started or contacted yet.

        Args:
            workdir: where an engine of ours may put files.
        """
        return type(self).adapter(**self.adapter_options())

    def adapter_options(self) -> dict[str, Any]:
        """The keyword values of the adapter: every key of the spec but ``kind``."""
        return {key: getattr(self, key) for key in type(self).model_fields if key != "kind"}

    def default_name(self, position: int) -> str:
        """The name of an engine that has none in the file; ``position`` is its place in the list, from 0."""
        return f"{self.kind}-{position}"

    @property
    def logprobs_given(self) -> Logprobs:
        """Which log-probabilities the engine gives; one without the choice gives them after temperature."""
        return "temperature"

    @property
    def gives_untruncated(self) -> bool:
        """Whether it gives log-probabilities after temperature and before truncation at any setting, or none at all."""
        return False

    @property
    def gives_text_alone(self) -> bool:
        """Whether its samples have no token ids."""
        return False

    @property
    def context_bound(self) -> int | None:
        """Tokens of prompt and response together, if ``context_tokens`` of the config bounds them."""
        return None

    @property
    def fault_share(self) -> float:
        """Share of requests that fail because the config asks for it."""
        return 0.0


class ServerSpec(EngineSpec):
    """An engine that runs somewhere already; its kinds have a ``url``."""

    if TYPE_CHECKING:
        url: ServerUrl

    def default_name(self, position: int) -> str:
        """Host and port."""
        return urlsplit(self.url).netloc
