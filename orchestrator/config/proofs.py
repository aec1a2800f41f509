"""Proofs over a whole config: settings that contradict each other, or under which a batch could never be formed.

Invariants:

* Pure but for one look at what stands at a path (is the state directory a file, would the log overwrite a prompt file).
* Each proof is one function and one sentence; the coming steps' weights are looked at in ``examine.py``.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from .document import Config
from .text import Finding

__all__ = ["MAX_SOCKET_PATH_BYTES", "find_contradictions"]

MAX_SOCKET_PATH_BYTES: Final = 107
"""``sun_path`` of Linux holds 108 bytes, the last of them zero."""

ZERO_STD_FILTER: Final = "check_reward_nonzero_std"


def find_contradictions(config: Config) -> Iterator[Finding]:
    """Everything in a valid config that cannot work."""
    for prove in PROOFS:
        yield from prove(config)


def _batch_fits_over_sampling(config: Config) -> Iterator[Finding]:
    rollout, bound = config.rollout, config.rollout.over_sampling_batch_size
    if bound is not None and bound < rollout.rollout_batch_size:
        yield Finding(
            ("rollout", "over_sampling_batch_size"),
            f"is {bound}, which is too small for a batch of {rollout.rollout_batch_size} groups",
            f"use at least rollout_batch_size, {rollout.rollout_batch_size}, or null",
        )


def _filter_keeps_something(config: Config) -> Iterator[Finding]:
    """Groups of equal rewards are dropped; samples that cannot differ would never pass, one sample has no spread."""
    if config.dynamic_sampling_filter != ZERO_STD_FILTER:
        return
    location = ("dynamic_sampling_filter",)
    if config.rollout.n_samples_per_prompt == 1:
        yield Finding(
            location,
            f"{ZERO_STD_FILTER} drops every group: with n_samples_per_prompt 1 the rewards of a group cannot differ",
            "use n_samples_per_prompt of at least 2, or null for no filter",
        )
        return
    for source in config.data_sources:
        sampling = config.sampling_of(source.name)
        if sampling.temperature == 0 or sampling.top_k == 1:
            why = "temperature 0" if sampling.temperature == 0 else "top_k 1"
            yield Finding(
                location,
                f"{ZERO_STD_FILTER} drops every group of {source.name}: with {why} all samples of a group are equal",
                "use a temperature above 0 and top_k other than 1, or null for no filter",
            )


def _caps_leave_something(config: Config) -> Iterator[Finding]:
    """A constant cap of 0 on a reward of 0 or 1, where groups of zeros are dropped as well."""
    if config.dynamic_sampling_filter != ZERO_STD_FILTER:
        return
    for index, cap in enumerate(config.data_source_reward_caps or ()):
        if cap == 0 and config.data_sources[index].reward.is_zero_or_one:
            yield Finding(
                ("data_source_reward_caps", index),
                f"a cap of 0 drops every group of {config.data_sources[index].name} that {ZERO_STD_FILTER} keeps",
                "use a cap above 0, or null for none",
            )


def _weights_not_all_zero(config: Config) -> Iterator[Finding]:
    if not any(config.data_source_weights):
        yield Finding(
            ("data_source_weights",), "all weights are 0: no batch could ever be formed", "at least one must be above 0"
        )


def _group_fits_buffer(config: Config) -> Iterator[Finding]:
    bound = config.rollout.rollout_batch_size
    for index, source in enumerate(config.data_sources):
        if source.buffer.groups is not None and len(config.data_sources) == 1 and source.buffer.groups < bound:
            yield Finding(
                ("data_sources", index, "buffer", "groups"),
                f"is {source.buffer.groups}, but this is the only source and a batch has {bound} groups",
                f"use at least rollout_batch_size, {bound}, or null",
            )


def _context_fits_response(config: Config) -> Iterator[Finding]:
    for position, engine in enumerate(config.engines):
        if (bound := engine.context_bound) is None:
            continue
        for index, source in enumerate(config.data_sources):
            longest = config.sampling_of(source.name).max_new_tokens
            if longest >= bound:
                own = source.sampling is not None and "max_new_tokens" in source.sampling.model_fields_set
                yield Finding(
                    ("data_sources", index, "sampling", "max_new_tokens") if own else ("sampling", "max_new_tokens"),
                    f"is {longest}: together with a prompt, this exceeds the {bound} tokens of "
                    f"engines[{position}].context_tokens",
                    "use fewer new tokens or a larger context",
                )


def _some_engine_works(config: Config) -> Iterator[Finding]:
    if all(engine.fault_share >= 1 for engine in config.engines):
        yield Finding(
            ("engines",),
            "every request would fail: the fault rates add up to 1",
            "use rates that add up to less than 1",
        )


def _logprobs_agree(config: Config) -> Iterator[Finding]:
    """At temperature 1 both kinds are the same numbers; elsewhere one batch must not mix them."""
    if len({engine.logprobs_given for engine in config.engines}) == 1:
        return
    if warm := [s.name for s in config.data_sources if config.sampling_of(s.name).temperature != 1]:
        yield Finding(
            ("engines",),
            f"the engines give different kinds of log-probabilities, and {', '.join(warm)} uses a temperature other "
            "than 1, at which they differ",
            "use the same logprobs for all engines, or temperature 1",
        )


def _logprobs_can_be_given(config: Config) -> Iterator[Finding]:
    """After temperature, some give log-probabilities of the truncated distribution only; at 1 the raw ones do."""
    asked = [p for p, engine in enumerate(config.engines) if not engine.gives_untruncated]
    asked = [p for p in asked if config.engines[p].logprobs_given == "temperature"]
    for source in config.data_sources:
        sampling = config.sampling_of(source.name)
        truncates = sampling.top_k != 0 or sampling.top_p != 1 or sampling.min_p != 0
        if truncates and sampling.temperature not in (0, 1):
            for position in asked:
                yield Finding(
                    ("engines", position),
                    f"cannot give the log-probabilities that {source.name} needs: after temperature "
                    f"{sampling.temperature:g} and before truncation",
                    "set logprobs: raw, or turn off top_k, top_p and min_p, or use temperature 1",
                )


def _engines_fit_together(config: Config) -> Iterator[Finding]:
    """Samples of text alone and samples of tokens cannot be mixed."""
    chats = [position for position, engine in enumerate(config.engines) if engine.gives_text_alone]
    if chats and len(chats) < len(config.engines):
        yield Finding(
            ("engines", chats[0], "dialect"),
            "chat gives only text, without token ids, but other engines of this config give tokens",
            "use dialect: chat for all engines or for none",
        )


def _engine_names_unique(config: Config) -> Iterator[Finding]:
    counts = Counter(engine.name for engine in config.engines)
    seen: set[str | None] = set()
    for index, engine in enumerate(config.engines):
        if counts[engine.name] > 1 and engine.name in seen:
            yield Finding(
                ("engines", index),
                f"{engine.name!r} is already the name of another engine",
                "list each server once; to list it twice, set name:",
            )
        seen.add(engine.name)


def _socket_can_be_bound(config: Config) -> Iterator[Finding]:
    socket, location = config.consumer.socket, ("consumer", "socket")
    length = len(str(socket).encode())
    if length > MAX_SOCKET_PATH_BYTES:
        yield Finding(
            location,
            f"{socket} has {length} bytes; the path of a Unix socket has at most {MAX_SOCKET_PATH_BYTES}",
            "use a shorter path, such as /run/orchestrator.sock",
        )
    elif socket.exists() and not socket.is_socket():
        yield Finding(location, f"{socket} exists and is not a socket", "use a path that does not exist yet")
    elif (above := _file_above(socket)) is not None:
        yield Finding(location, f"{above} is a file, but must be the socket's directory", "use another path")


def _state_dir_is_a_directory(config: Config) -> Iterator[Finding]:
    path = config.run.state_dir
    if (path.exists() and not path.is_dir()) or (above := _file_above(path)) is not None:
        wrong = path if path.exists() else above
        yield Finding(("run", "state_dir"), f"{wrong} is a file, but must be a directory", "use another path")


def _log_file_is_its_own(config: Config) -> Iterator[Finding]:
    log, location = config.logging.file, ("logging", "file")
    if log is None:
        return
    others = {source.prompts.file: f"the prompts of {source.name}" for source in config.data_sources}
    others |= {config.consumer.socket: "consumer.socket", config.run.state_dir: "run.state_dir"}
    if log in others:
        hint = "use another file, such as logs/orchestrator.jsonl"
        yield Finding(location, f"{log} is already used as {others[log]}", hint)
    elif log.is_dir():
        yield Finding(location, f"{log} is a directory", f"name a file, such as {log.name}/orchestrator.jsonl")
    elif (above := _file_above(log)) is not None:
        yield Finding(location, f"{above} is a file, but must be the log's directory", "use another path")


def _archive_can_be_written(config: Config) -> Iterator[Finding]:
    archive = config.archive
    if archive is None:
        return
    if archive.format == "parquet" and importlib.util.find_spec("pyarrow") is None:
        yield Finding(
            ("archive", "format"),
            "parquet needs pyarrow, which is not installed",
            "pip install 'rollout-orchestrator[prompts]', or use jsonl",
        )
    path = archive.path
    if path == config.run.state_dir:
        yield Finding(("archive", "path"), "is the same path as run.state_dir", "use another directory")
    elif (path.exists() and not path.is_dir()) or (above := _file_above(path)) is not None:
        wrong = path if path.exists() else above
        yield Finding(("archive", "path"), f"{wrong} is a file, but must be a directory", "use another path")


def _sinks_are_installed(config: Config) -> Iterator[Finding]:
    for position, sink in enumerate(config.metrics.sinks):
        if (missing := sink.missing_package()) is not None:
            yield Finding(("metrics", "sinks", position), *missing)


def _file_above(path: Path) -> Path | None:
    """The first of the directories above that is something else."""
    return next((parent for parent in path.parents if parent.exists() and not parent.is_dir()), None)


def _socket_is_its_own(config: Config) -> Iterator[Finding]:
    if config.consumer.socket == config.run.state_dir:
        yield Finding(("consumer", "socket"), "is the same path as run.state_dir", "use another path")


PROOFS: Final[tuple[Callable[[Config], Iterator[Finding]], ...]] = (
    _batch_fits_over_sampling,
    _filter_keeps_something,
    _caps_leave_something,
    _weights_not_all_zero,
    _group_fits_buffer,
    _context_fits_response,
    _some_engine_works,
    _logprobs_agree,
    _logprobs_can_be_given,
    _engines_fit_together,
    _engine_names_unique,
    _socket_can_be_bound,
    _socket_is_its_own,
    _state_dir_is_a_directory,
    _log_file_is_its_own,
    _archive_can_be_written,
    _sinks_are_installed,
)
