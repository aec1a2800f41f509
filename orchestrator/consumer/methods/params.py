"""Parameters of the protocol's methods, as types that check them.

Invariants:

* Unknown parameters, wrong types and values out of range are refused with a sentence that names them, before any state
  is touched.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import msgspec

from orchestrator.errors import BadRequest

__all__ = [
    "Ack",
    "Cancel",
    "Engines",
    "GetBatch",
    "Hello",
    "Load",
    "Nack",
    "NoParams",
    "PauseGeneration",
    "Save",
    "SetPolicyVersion",
    "SetWeight",
    "Source",
    "Sources",
    "UpdateWeights",
    "VerifyCheckpoints",
    "parse_params",
]

Seconds = Annotated[float, msgspec.Meta(ge=0, le=7 * 86400)]
Rank = Annotated[int, msgspec.Meta(ge=0, lt=65536)]
WorldSize = Annotated[int, msgspec.Meta(ge=1, le=65536)]
Version = Annotated[int, msgspec.Meta(ge=0, lt=2**53)]


class _Params(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of all parameters."""


class NoParams(_Params, frozen=True):
    """A method without parameters."""


class Hello(_Params, frozen=True):
    """Who connects; with ``rank`` it takes that rank at once."""

    client: str = ""
    protocol: int = 1
    rank: Rank | None = None
    takeover: bool = False


class GetBatch(_Params, frozen=True):
    """``timeout_s`` ``None`` waits for as long as the connection lives; ``by_file``: descriptors in place of frames."""

    timeout_s: Seconds | None = None
    rank: Rank = 0
    world_size: WorldSize = 1
    by_file: bool = False


class Ack(_Params, frozen=True):
    """A lease that is trained on."""

    lease: str


class Nack(_Params, frozen=True):
    """A lease that is given back."""

    lease: str
    discard: bool = False


class Cancel(_Params, frozen=True):
    """A pending request of the same connection."""

    id: int


class SetPolicyVersion(_Params, frozen=True):
    """The version that new tokens carry from now on."""

    version: Version
    mode: Literal["keep", "abort"] = "keep"


class PauseGeneration(_Params, frozen=True):
    """``timeout_s`` bounds the wait for quiet engines and the pause itself."""

    mode: Literal["abort", "finish"] = "abort"
    timeout_s: Seconds = 600.0


class UpdateWeights(_Params, frozen=True):
    """New parameters for every engine; ``timeout_s`` is for each."""

    path: Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]
    version: Version
    mode: Literal["abort", "finish", "keep"] = "abort"
    rolling: bool = False
    timeout_s: Seconds = 600.0


class Engines(_Params, frozen=True):
    """What to do with the engines; ``name`` says with which, ``engine`` is one as a config file says it."""

    action: Literal["list", "add", "drain", "resume", "remove"] = "list"
    name: str | None = None
    engine: dict[str, Any] | None = None


class Sources(_Params, frozen=True):
    """What to do with the sources; ``name`` says with which, the others are one as a config file says it."""

    action: Literal["list", "add", "remove", "restore"] = "list"
    name: str | None = None
    source: dict[str, Any] | None = None
    weight: float | str | None = None
    cap: float | str | None = None


class Save(_Params, frozen=True):
    """A named checkpoint of now; batches up to step ``trained_through`` count as acknowledged, on all ranks."""

    name: str
    trained_through: Annotated[int, msgspec.Meta(ge=0, lt=2**53)] | None = None


class Load(_Params, frozen=True):
    """Back to a named checkpoint."""

    name: str


class Status(_Params, frozen=True):
    """``history``: of how many of the last steps to give the figures too."""

    history: Annotated[int, msgspec.Meta(ge=0)] = 0


class VerifyCheckpoints(_Params, frozen=True):
    """``name`` ``None``: all of them."""

    name: str | None = None


class SetWeight(_Params, frozen=True):
    """``weight`` ``None``: back to the config file."""

    source: str
    weight: float | str | None


class Source(_Params, frozen=True):
    """One source by its name."""

    source: str


P = TypeVar("P", bound=_Params)


def parse_params(kind: type[P], method: str, params: dict[str, Any]) -> P:
    """The parameters of a request.

    Raises:
        BadRequest: they do not fit; the message names the parameter.
    """
    try:
        return msgspec.convert(params, kind)
    except msgspec.ValidationError as error:
        raise BadRequest(f"{method}: {error}") from None
