"""The vocabulary of the state log: everything that changes the durable facts of a run.

Invariants:

* An event says what was decided, never how: replaying events needs no config, no clock and no other file.
* Events are written in the order in which they were applied (:class:`~.ledger.Ledger`), so that replay is the same fold
  again.
* Finished groups and partial rollouts are not events but frames (``orchestrator.frames``, ``.partials``);
  the log holds both kinds of record.
* A field is never renamed or given another meaning; new fields have defaults, so that old logs stay readable.
"""

from __future__ import annotations

from typing import Any

import msgspec

__all__ = [
    "AddedSource",
    "Archived",
    "BatchFormed",
    "CheckpointLoaded",
    "Dropped",
    "EngineAdded",
    "EngineDrained",
    "EngineRemoved",
    "Event",
    "Launched",
    "LeaseAcked",
    "LeaseDiscarded",
    "ParametersHeld",
    "Resplit",
    "SourceFacts",
    "SourcePaused",
    "SourceResumed",
    "SourcesChanged",
    "VersionSet",
    "WeightSet",
    "decode_event",
    "encode_event",
]


class _Event(msgspec.Struct, frozen=True, tag_field="event", omit_defaults=True):
    """Base of all events; the JSON object's ``event`` key names the type."""


class Launched(_Event, tag="launched", frozen=True):
    """A prompt was taken and its group got its index.

    ``first_sample`` is the index of the group's first sample, the others follow it. ``rerun`` says that the prompt came
    from the source's queue of prompts to run again and not from its cursor.
    """

    source: str
    group_index: int
    first_sample: int
    n: int
    prompt_index: int
    epoch: int
    rerun: bool = False


class Dropped(_Event, tag="dropped", frozen=True):
    """A group ended without being handed out.

    ``rerun`` puts its prompt at the end of the queue of prompts to run again, under a new index. ``lengths`` are the
    response lengths in tokens of the samples that were dropped, ``rewards`` what they were given where all of a group
    that was generating were scored.
    """

    source: str
    group_index: int
    reason: str
    lengths: list[int] = []
    rerun: bool = False
    rewards: list[float] = []


class BatchFormed(_Event, tag="batch", frozen=True):
    """A batch was formed, leased, and the step advanced.

    ``shares[r]`` are the group indices of rank ``r`` in the order of hand-out. ``carry`` is the carried remainder of
    each source after this batch, ``debt`` where it has changed (``borrowing.py``).
    ``adaptive`` are the weights, not normalised, of the sources that have an adaptive one.
    """

    step: int
    policy_version: int
    weights: dict[str, float]
    counts: dict[str, int]
    carry: dict[str, float]
    shares: list[list[int]]
    split: int = 0
    debt: dict[str, float] = {}
    adaptive: dict[str, float] = {}


class Resplit(_Event, tag="resplit", frozen=True):
    """What is not acknowledged of a leased batch was shared out anew; its earlier leases ended."""

    step: int
    shares: list[list[int]]
    split: int


class LeaseAcked(_Event, tag="ack", frozen=True):
    """A share was acknowledged by its rank; with ``archive`` its groups are kept until they are in the archive."""

    step: int
    rank: int
    archive: bool = False


class Archived(_Event, tag="archived", frozen=True):
    """A batch that was trained on need not be kept any more: it is in the archive, or was given up.

    ``history`` is the nonce of its leases.
    """

    history: str
    step: int
    is_given_up: bool = False


class LeaseDiscarded(_Event, tag="discard", frozen=True):
    """A share was given back for good (``nack`` with ``discard``)."""

    step: int
    rank: int


class VersionSet(_Event, tag="version", frozen=True):
    """New policy parameters are live in the engines; ``path`` is where they are, if that is known."""

    version: int
    path: str | None = None


class SourceFacts(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the state has to know of a source.

    ``rows`` are its prompts in an epoch, ``epochs`` says how often they are gone through (``None``: for ever),
    ``renamed_from`` under which name it ran before, if that was another one.
    """

    name: str
    rows: int
    epochs: int | None = None
    renamed_from: str | None = None


class AddedSource(msgspec.Struct, frozen=True):
    """A source that came at run time: ``source`` as a config file says it, with its weight, its cap, its prompts."""

    source: dict[str, Any]
    weight: float | str
    cap: float | str | None
    rows: int
    epochs: int | None


class SourcesChanged(_Event, tag="sources", frozen=True):
    """These are the sources from here on, in this order; see ``.changed_sources`` for the others.

    What was done at run time stands beside it: ``added``; ``removed``, with what the file said of them; ``undone``,
    names for which neither holds any more.
    """

    sources: list[SourceFacts]
    added: dict[str, AddedSource] = {}
    removed: dict[str, dict[str, Any]] = {}
    undone: list[str] = []


class ParametersHeld(_Event, tag="held", frozen=True):
    """What is known of the parameters that an engine holds; see ``orchestrator.engines.pool.held_parameters``."""

    engine: str
    version: int | None
    identity: str | None


class EngineAdded(_Event, tag="engine_added", frozen=True):
    """An engine was added at run time; ``options`` are those of a config file, with its name."""

    engine: str
    options: dict[str, Any]


class EngineDrained(_Event, tag="engine_drained", frozen=True):
    """An engine gets no new requests, or gets them again.

    ``options``, here and at ``EngineRemoved``, are what the file said of it at that time, so that a change of the file
    is noticed; ``None`` for one that was added at run time.
    """

    engine: str
    is_draining: bool
    options: dict[str, Any] | None = None


class EngineRemoved(_Event, tag="engine_removed", frozen=True):
    """An engine was let go; with ``is_undone`` one of the file is used again."""

    engine: str
    options: dict[str, Any] | None = None
    is_undone: bool = False


class WeightSet(_Event, tag="weight", frozen=True):
    """A weight was set at run time.

    ``weight`` is ``None`` for back to the file; ``file_weight`` is what the file said at that time, so that a change of
    the file is noticed.
    """

    source: str
    weight: float | str | None
    file_weight: float | str | None = None


class SourcePaused(_Event, tag="pause", frozen=True):
    """A source takes no part in new batches."""

    source: str


class SourceResumed(_Event, tag="resume", frozen=True):
    """A source takes part again."""

    source: str


class CheckpointLoaded(_Event, tag="load", frozen=True):
    """The state is that of a checkpoint from here on; ``nonce`` is that of its leases, ``checksum`` its snapshot's."""

    name: str
    nonce: str
    checksum: int


Event = (
    Launched
    | Dropped
    | BatchFormed
    | Resplit
    | LeaseAcked
    | Archived
    | LeaseDiscarded
    | VersionSet
    | WeightSet
    | SourcePaused
    | SourceResumed
    | ParametersHeld
    | EngineAdded
    | EngineDrained
    | EngineRemoved
    | CheckpointLoaded
    | SourcesChanged
)

_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[Event] = msgspec.json.Decoder(Event)


def encode_event(event: Event) -> bytes:
    """The event as one JSON object."""
    return _encoder.encode(event)


def decode_event(text: bytes | memoryview) -> Event:
    """The event that ``encode_event`` wrote.

    Raises:
        msgspec.ValidationError: not an event of this version.
    """
    return _decoder.decode(text)
