"""Lets slime train on what a running daemon generates (``--rollout-function-path``).

Invariants:

* A rollout is one batch of the daemon, group by group, as slime's own ``Sample`` if slime is installed.
* A batch is acknowledged when it has certainly been trained on. slime's asynchronous trainer asks for a rollout while
  it trains on the previous one, so each request acknowledges the batch two rollouts back. Saving acknowledges all
  batches up to the saved rollout.
* One slime process gets nothing twice: a batch that is handed out again after a broken connection is recognised.
* State between rollouts is kept on the data source that slime passes to every call; there is no global state.
* slime and the client library (numpy) are imported by the first rollout.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Final

from orchestrator.slime.samples import SOURCE_KEY, STEP_KEY, WEIGHT_KEY, optional_module, sample_type

from .errors import BadRequest, BatchTimeout, ConnectionLost

if TYPE_CHECKING:
    from .client import Batch, RolloutClient, RolloutGroup, RolloutSample

__all__ = ["DaemonDataSource", "RolloutOutput", "generate_rollout"]

logger = logging.getLogger(__name__)

SOCKET_OPTION: Final = "orchestrator_socket"
"""Key of ``--custom-config-path`` that names the daemon's socket."""

TIMEOUT_OPTION: Final = "orchestrator_timeout_s"
TIMEOUT_S: Final = 3600.0
"""Default of the longest wait for one batch."""

WAIT_SLICE_S: Final = 30.0
"""The cause of a wait is logged this often."""

RECONNECT_S: Final = 120.0
"""How long to wait for a daemon that is being restarted."""

_SESSION: Final = "_orchestrator_session"


@dataclass
class RolloutOutput:
    """What slime calls ``RolloutFnTrainOutput``: groups of samples, and metrics of the rollout."""

    samples: list[list[Any]]
    metrics: dict[str, Any] = field(default_factory=dict)


class _Session:
    """A connection to the daemon, and the batches that are not acknowledged."""

    def __init__(self, args: Any) -> None:
        from .client import RolloutClient

        self.client: RolloutClient = RolloutClient(getattr(args, SOCKET_OPTION, None), client="slime")
        self.timeout_s = float(getattr(args, TIMEOUT_OPTION, None) or TIMEOUT_S)
        self.held: dict[int, tuple[int, str]] = {}  # step → slime's rollout, lease

    def next(self, rollout_id: int) -> Batch:
        """The batch for a rollout."""
        deadline = time.monotonic() + self.timeout_s
        while True:
            try:
                self.acknowledge(rollout_id - 2)
                self._set_version(rollout_id)
                batch = self.client.get_batch(timeout_s=min(WAIT_SLICE_S, max(0.0, deadline - time.monotonic())))
            except BatchTimeout as error:
                logger.warning("rollout %d is waiting: %s", rollout_id, error)
                if time.monotonic() >= deadline:
                    raise
            except ConnectionLost as error:
                logger.warning("rollout %d: %s; reconnecting", rollout_id, error)
                self.client.connect(RECONNECT_S)
            else:
                known = self.held.get(batch.step)
                self.held[batch.step] = (rollout_id if known is None else known[0], batch.lease)
                if known is None or known[0] == rollout_id:
                    return batch

    def acknowledge(self, through: int) -> None:
        """Acknowledge the rollouts up to this one: they have been trained on."""
        for step, (rollout_id, lease) in list(self.held.items()):
            if rollout_id <= through:
                self.client.ack(lease)
                del self.held[step]

    def _set_version(self, rollout_id: int) -> None:
        """Slime updates its parameters before it asks: the policy of rollout k has had k steps."""
        if self.client.hello()["policy_version"] < rollout_id:
            self.client.set_policy_version(rollout_id)


def _session(args: Any, data_source: Any) -> _Session:
    session: _Session | None = getattr(data_source, _SESSION, None)
    if session is None:
        session = _Session(args)
        setattr(data_source, _SESSION, session)
        weakref.finalize(data_source, session.client.close)
    return session


class DaemonDataSource:
    """A data source for slime that keeps the daemon's checkpoints beside slime's (``--data-source-path``).

    The daemon reads the prompts; slime asks for none when rollouts come from :func:`generate_rollout`. Any other data
    source of slime works too, but the daemon is then neither saved nor loaded with slime.
    """

    def __init__(self, args: Any) -> None:
        self.args = args

    def __len__(self) -> int:
        sources = _session(self.args, self).client.status()["sources"].values()
        return sum(int(source["cursor"]["prompts"]) for source in sources)

    @property
    def dataset(self) -> DaemonDataSource:
        """Slime takes its length."""
        return self

    def get_samples(self, num_samples: int) -> list[list[Any]]:
        """There are none here.

        Raises:
            BadRequest: always.
        """
        raise BadRequest(
            "the daemon reads the prompts: set --rollout-function-path orchestrator.slime_rollout.generate_rollout"
        )

    def add_samples(self, samples: list[list[Any]]) -> None:
        """Accepts no samples: the daemon keeps its partial rollouts itself.

        Raises:
            BadRequest: there are some.
        """
        if samples:
            raise BadRequest("the daemon keeps partial rollouts itself: do not return samples here")

    def save(self, rollout_id: int) -> None:
        """Save a checkpoint of the daemon under slime's rollout number; rollouts up to it count as trained on.

        Raises:
            StateError: the disk failed.
        """
        session = _session(self.args, self)
        session.acknowledge(rollout_id)
        session.client.save(str(rollout_id))

    def load(self, rollout_id: int | None = None) -> None:
        """Let the daemon go back to the checkpoint. Does nothing for a new run (``None``, or a number below 0).

        Raises:
            CheckpointError: the daemon has no such checkpoint, so it and slime would be at different steps.
        """
        if rollout_id is not None and rollout_id >= 0:
            session = _session(self.args, self)
            session.client.load(str(rollout_id))
            session.held.clear()


def generate_rollout(args: Any, rollout_id: int, data_source: Any, evaluation: bool = False) -> Any:
    """Take the next batch of a running daemon.

    If the daemon's policy version is below ``rollout_id``, it is set to it.

    Args:
        args: slime's options. ``orchestrator_socket``: the daemon's socket (default: ``$ORCHESTRATOR_SOCKET``, then
            ``run/orchestrator.sock``); ``orchestrator_timeout_s``: the longest wait for a batch, 3600.
        rollout_id: slime's number of the rollout.
        data_source: slime's; :class:`DaemonDataSource` keeps the daemon's checkpoints as well.
        evaluation: evaluation is left to slime's own rollout.

    Returns:
        slime's ``RolloutFnTrainOutput`` (:class:`RolloutOutput` without slime); groups in the order of hand-out.

    Raises:
        BatchTimeout: no batch in time; the message says why.
        RunFinished: the daemon's run has ended.
        BadRequest: the daemon's batches have another size than slime's options say (a ``ValueError``).
    """
    if evaluation:
        return _evaluate(args, rollout_id, data_source)
    session = _session(args, data_source)
    begin = time.monotonic()
    batch = session.next(rollout_id)
    _check_size(args, batch)
    kind = sample_type()
    samples = [[_sample(kind, args, batch, group, sample) for sample in group.samples] for group in batch.groups]
    metrics = {
        "rollout/orchestrator/step": batch.step,
        "rollout/orchestrator/policy_version": batch.policy_version,
        "rollout/orchestrator/wait_s": time.monotonic() - begin,
    }
    module = optional_module("slime.rollout.base_types")
    output = RolloutOutput if module is None else getattr(module, "RolloutFnTrainOutput", RolloutOutput)
    return output(samples=samples, metrics=metrics)


def _evaluate(args: Any, rollout_id: int, data_source: Any) -> Any:
    module = optional_module("slime.rollout.sglang_rollout")
    if module is None:
        raise BadRequest("the daemon does not evaluate: set slime's --eval-function-path")
    return module.generate_rollout(args, rollout_id, data_source, evaluation=True)


def _check_size(args: Any, batch: Batch) -> None:
    sizes = {
        "rollout_batch_size": {len(batch.groups)},
        "n_samples_per_prompt": {group.n for group in batch.groups},
    }
    for name, found in sizes.items():
        wanted = getattr(args, name, None)
        if wanted is not None and found != {wanted}:
            raise BadRequest(
                f"the daemon's batch has {name} {', '.join(map(str, sorted(found)))}, but slime's option is {wanted}:"
                " use the same value in both configs"
            )


def _sample(kind: type[Any], args: Any, batch: Batch, group: RolloutGroup, sample: RolloutSample) -> Any:
    """One response, with everything that slime's type can hold."""
    tags = {SOURCE_KEY: group.source, WEIGHT_KEY: batch.weights.get(group.source, 0.0), STEP_KEY: batch.step}
    response, logprobs = sample.response_tokens.tolist(), sample.logprobs
    values: dict[str, Any] = {
        "group_index": group.group_index,
        "index": sample.index,
        "rollout_id": sample.index,
        "prompt": "" if group.prompt is None else group.prompt,
        "tokens": [*group.prompt_tokens.tolist(), *response],
        "response": sample.text,
        "response_length": len(response),
        "label": group.label,
        "reward": _reward(args, sample),
        "loss_mask": sample.loss_mask.tolist(),
        "rollout_log_probs": None if logprobs is None else logprobs.tolist(),
        "weight_versions": [str(version) for version, _ in sample.versions if version >= 0],
        "metadata": {**group.metadata, **sample.metadata, **tags},
        "session_id": str(group.group_index),
    }
    known = {item.name for item in fields(kind)}
    made = kind(**{name: value for name, value in values.items() if name in known})
    for name in values.keys() - known:
        setattr(made, name, values[name])
    made.status = type(made.status)(sample.status.value)
    return made


def _reward(args: Any, sample: RolloutSample) -> Any:
    """The number; the whole dictionary if slime picks an entry by ``reward_key``."""
    detail = sample.metadata.get("reward")
    return dict(detail) if getattr(args, "reward_key", None) and isinstance(detail, Mapping) else sample.reward
