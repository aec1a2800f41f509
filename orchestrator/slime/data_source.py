"""The data source for slime: weighted sources, each with a buffer of its own (``--data-source-path``).

Invariants:

* The mixture is exact. Each group comes from the source with the largest remainder. Remainders are carried on and stay
  within H_n - 1 groups for n sources (see ``apportionment.py``). So k calls of ``get_samples(1)`` give the same groups
  as ``get_samples(k)``, and every count is right at every moment.
* A group counts once, when it is first handed out. Groups returned by ``add_samples`` are handed out again before
  anything new, whatever the current weight of their source, and do not count again.
* The step is the number of batches formed. If the log function of ``custom_log.py`` runs, it counts slime's rollouts.
  Without it every ``rollout_batch_size`` groups handed out are a batch. Groups that slime filters then count as well,
  because slime does not tell a data source about them.
* Group and sample indices are unique and consecutive over all sources.
* A call that raises has changed nothing. Methods may be called from several threads, as slime's asynchronous rollout
  does.
* slime is imported when a data source is made, and only if it is installed.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Sequence
from typing import Any

from orchestrator.core.mixture.apportionment import apportion
from orchestrator.core.weights.table import WeightRow
from orchestrator.errors import CorruptState, ForeignState, StateError, WeightError

from .checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from .options import BATCHES_FORMED, read_options
from .prompts import PromptRow, load_tokenizer, read_prompts, read_through_slime
from .samples import SOURCE_KEY, STEP_KEY, WEIGHT_KEY, leaves, sample_type
from .sources import Group, Source, Sources

__all__ = ["MultipleWeightedRolloutDataSourceWithBuffer"]

logger = logging.getLogger(__name__)


class MultipleWeightedRolloutDataSourceWithBuffer:
    """Prompts of several sources, in a mixture whose weights change with the rollout step.

    Args:
        args: slime's options. This data source adds ``prompt_data`` (a list of files), ``prompt_data_source_names``,
            ``data_source_weights`` and ``data_source_reward_caps``. All others are slime's own, with slime's names and
            defaults.

    Raises:
        ConfigError: options cannot be used; all of them are named (it is a ``ValueError``).
        PromptFileError: a file of prompts cannot be used (a ``ValueError`` too).
    """

    def __init__(self, args: Any) -> None:
        self.args = args
        self.metadata: dict[str, Any] = {}
        self._options = read_options(args)
        self._sample = sample_type()
        seed = self._options.seed if self._options.shuffle else None
        self._sources = Sources(
            Source(name, rows, seed) for name, rows in zip(self._options.names, self._read(), strict=True)
        )
        self._carry: Sequence[float] = [0.0] * len(self._options.names)
        self._counted_steps = 0
        self._in_batch = 0  # groups handed out since the last counted step, fewer than rollout_batch_size
        self._next_group = 0
        self._next_sample = 0
        self._warned: int | None = None  # the last step whose warnings were logged
        self._lock = threading.RLock()

    def _read(self) -> list[list[PromptRow]]:
        """The prompts of each source, read by slime's own loader if slime is installed, else by ours."""
        by_slime = [read_through_slime(self.args, path) for path in self._options.paths]
        read = [rows for rows in by_slime if rows is not None]
        if len(read) == len(by_slime):
            return read
        tokenizer = load_tokenizer(self._options.prompts)
        return [read_prompts(path, self._options.prompts, tokenizer) for path in self._options.paths]

    # -- handing out --------------------------------------------------------------------------------------------------

    @property
    def rollout_step(self) -> int:
        """The step at which the weights of the next group are evaluated; 0 at first."""
        formed = getattr(self.args, BATCHES_FORMED, None)
        return self._counted_steps if formed is None else int(formed)

    def get_samples(self, num_samples: int) -> list[list[Any]]:
        """The next groups [num_samples], each of ``n_samples_per_prompt`` samples: returned ones first, then new ones.

        Raises:
            ValueError: a number below 0.
            WeightError: at a needed step all weights are 0, or failed without an earlier good value.
        """
        if num_samples < 0:
            raise ValueError(f"get_samples needs a number of at least 0, not {num_samples}")
        with self._lock:
            groups = self._take_returned(num_samples)
            try:
                rows = self._rows(num_samples - len(groups))
            except WeightError:
                self._sources.put_back(groups)
                raise
            groups += [self._new_group(row) for row in rows]
            return groups

    def _rows(self, count: int) -> list[WeightRow]:
        """The weights for each of the next ``count`` new groups."""
        size = self._options.rollout_batch_size
        follows_slime = getattr(self.args, BATCHES_FORMED, None) is not None
        ahead = [0 if follows_slime else (self._in_batch + i) // size for i in range(count)]
        rows = {steps: self._row(self.rollout_step + steps) for steps in dict.fromkeys(ahead)}
        return [rows[steps] for steps in ahead]

    def _row(self, step: int) -> WeightRow:
        row = self._options.table.at(step)
        if row.warnings and self._warned != step:
            self._warned = step
            for warning in row.warnings:
                logger.warning("%s", warning)
        if not any(row.shares.values()):
            raise WeightError("; ".join((f"all weights are 0 at step {step}: no source can be drawn", *row.warnings)))
        return row

    def _new_group(self, row: WeightRow) -> Group:
        """Draw a source, take its next prompt, and advance all counters."""
        drawn = apportion(list(row.shares.values()), self._carry, 1)
        source = self._sources[self._options.names[drawn.counts.index(1)]]
        prompt = source.next_prompt()
        tags = {SOURCE_KEY: source.name, WEIGHT_KEY: row.shares[source.name], STEP_KEY: row.step}
        group = [self._new_sample(prompt, i, tags) for i in range(self._options.n_samples_per_prompt)]
        self._carry = drawn.carry
        self._next_group += 1
        self._next_sample += len(group)
        self._count_group()
        return group

    def _new_sample(self, prompt: PromptRow, place: int, tags: dict[str, Any]) -> Any:
        if prompt.prototype is not None:
            sample = copy.deepcopy(prompt.prototype)
        else:
            sample = self._sample(prompt=copy.deepcopy(prompt.prompt), label=copy.deepcopy(prompt.label))
        sample.metadata = copy.deepcopy(prompt.metadata) | tags
        sample.group_index, sample.index = self._next_group, self._next_sample + place
        return sample

    def _count_group(self) -> None:
        batches, self._in_batch = divmod(self._in_batch + 1, self._options.rollout_batch_size)
        self._counted_steps += batches

    # -- taking back --------------------------------------------------------------------------------------------------

    def add_samples(self, samples: list[list[Any]]) -> None:
        """Take groups back, finished or not. They are handed out again unchanged, before anything new.

        Samples without an index get one.

        Raises:
            ValueError: a group does not have ``n_samples_per_prompt`` entries; no group is taken.
            SourceUnknown: the samples of a group do not all name one of our sources; no group is taken.
        """
        size = self._options.n_samples_per_prompt
        for group in samples:
            if not isinstance(group, list) or len(group) != size:
                found = len(group) if isinstance(group, list) else type(group).__name__
                raise ValueError(f"add_samples takes groups, lists of {size} samples each, not {found}")
        with self._lock:
            by_source = [(self._sources.of(group), group) for group in samples]
            for source, group in by_source:
                self._give_indices(group)
                source.put_back([group])
                source.returned += 1

    def _give_indices(self, group: Group) -> None:
        samples = list(leaves(group))
        if any(sample.group_index is None for sample in samples):
            for sample in samples:
                sample.group_index = self._next_group
            self._next_group += 1
        for sample in samples:
            if sample.index is None:
                sample.index = self._next_sample
                self._next_sample += 1

    def _take_returned(self, count: int) -> list[Group]:
        if self._options.buffer_filter is None:
            return self._sources.take_returned(count)
        return self._sources.take_filtered(count, self._options.buffer_filter, self.args)

    # -- what slime asks ----------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return sum(map(len, self._sources))

    @property
    def dataset(self) -> MultipleWeightedRolloutDataSourceWithBuffer:
        """Some versions of slime take its length to compute the rollouts of an epoch."""
        return self

    def get_buffer_length(self) -> int:
        """Number of returned groups that wait, over all sources."""
        return sum(len(source.buffer) for source in self._sources)

    def update_metadata(self, metadata: dict[str, Any]) -> None:
        """Keep values of the user. They are saved in checkpoints and have to be JSON."""
        self.metadata.update(metadata)

    def get_metadata(self) -> dict[str, Any]:
        """The values of :meth:`update_metadata`."""
        return self.metadata

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def save(self, rollout_id: int) -> None:
        """Write ``{args.save}/rollout/data_source_state_{rollout_id}.json``, completely or not at all.

        Raises:
            StateError: ``args.save`` is not set, a sample cannot be written as JSON, or the disk failed.
        """
        if self._options.save is None:
            raise StateError(f"cannot save the data source at rollout {rollout_id}: set --save to a directory")
        with self._lock:
            save_checkpoint(self._options.save, rollout_id, self._to_json())

    def _to_json(self) -> dict[str, Any]:
        return {
            "sources": self._sources.to_json(),
            "carry": list(self._carry),
            "order": self._order(),
            "step": self._counted_steps,
            "in_batch": self._in_batch,
            "counts_rollouts": getattr(self.args, BATCHES_FORMED, None) is not None,
            "next_group": self._next_group,
            "next_sample": self._next_sample,
            "metadata": self.metadata,
        }

    def _order(self) -> dict[str, Any]:
        return {"rollout_seed": self._options.seed, "rollout_shuffle": self._options.shuffle}

    def load(self, rollout_id: int | None = None) -> None:
        """Continue exactly where the checkpoint was saved.

        ``None`` loads the newest checkpoint in ``args.load``, if there is one. slime starts a run with rollout -1. For
        -1 and for ``None`` a checkpoint is optional.

        Raises:
            StateError: there is no such checkpoint; without it the curriculum would restart at step 0.
            ForeignState: it belongs to other sources or to another order of prompts; both are named.
            CorruptState: it is not a valid checkpoint.
        """
        root = self._options.load
        is_start = rollout_id is None or rollout_id < 0
        if rollout_id is None and root is not None:
            rollout_id = latest_checkpoint(root)
        state = None if root is None or rollout_id is None else load_checkpoint(root, rollout_id)
        if state is not None and rollout_id is not None:
            with self._lock:
                self._restore(state, rollout_id)
        elif not is_start:
            raise StateError(
                f"there is no checkpoint of the data source for rollout {rollout_id} in {root}. Without it the"
                " curriculum would restart at step 0: set --load to where it was saved, or start at rollout 0"
            )

    def _restore(self, state: dict[str, Any], rollout_id: int) -> None:
        try:
            if state["order"] != self._order():
                raise ForeignState(
                    f"the checkpoint has another order of prompts: it has {state['order']}, the options say"
                    f" {self._order()}"
                )
            batches, in_batch = divmod(state["in_batch"], self._options.rollout_batch_size)
            carry, counted_steps = [float(owed) for owed in state["carry"]], state["step"] + batches
            counts_rollouts, metadata = state["counts_rollouts"], state["metadata"]
            next_group, next_sample = state["next_group"], state["next_sample"]
            self._sources.restore(state["sources"], self._sample)
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptState(f"the data source's checkpoint is damaged: {type(error).__name__}: {error}") from error
        self._carry, self._in_batch, self._counted_steps = carry, in_batch, counted_steps
        self._next_group, self._next_sample, self.metadata = next_group, next_sample, metadata
        if counts_rollouts or hasattr(self.args, BATCHES_FORMED):
            # Not the count at the time of saving: slime may have been a rollout ahead, which it now repeats.
            setattr(self.args, BATCHES_FORMED, rollout_id + 1 if counts_rollouts else None)
