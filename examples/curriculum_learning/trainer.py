"""A complete trainer: GRPO on the daemon's batches, with new parameters in the engine after each one. Copy it.

    python -m examples.curriculum_learning.trainer state/demo-trainer --init    # writes the first parameters
    orchestrator run config/demo.yaml                                           # its engine loads them
    python -m examples.curriculum_learning.trainer state/demo-trainer           # trains until the run is finished

`orchestrator demo` does all three for you. The only part of this project that a trainer needs is `orchestrator.client`.
The rest of this file is numpy, autograd and the model (`tiny_llama.py`). docs/your-own-trainer.md continues to torch.

Invariants:

* The policy version is the number of batches trained on. The state is saved after each batch, before its parameters are
  published, and the batch is acknowledged after both. So each batch is trained on exactly once, whatever is killed: a
  batch that comes again although the saved state includes it is skipped.
* The engine never serves a file that is being written or is written next.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import autograd.numpy as np
import numpy
from autograd import grad

from orchestrator.client import Batch, RolloutClient
from orchestrator.errors import ConnectionLost, UpdateFailed

from .tiny_llama import PAD, Parameters, initial_parameters, log_probabilities, one_hot, write_gguf

UPDATES: Final = 2
"""Gradient steps for each batch."""

LOWEST_RATIO, HIGHEST_RATIO = 0.8, 1.25
"""Outside this range the ratio of new to old probability has no gradient (PPO's clipping, arXiv:1707.06347)."""

ADVANTAGE_EPSILON: Final = 0.1
"""Added to the standard deviation of a group's rewards: one lucky answer of eight counts 2.0, not 2.6."""

ENTROPY_BONUS: Final = 0.015
"""Keeps a policy that has found half of an answer looking for the rest."""

LEARNING_RATE: Final = 2e-3
ADAM_DECAYS: Final = (0.9, 0.99)
ADAM_EPSILON: Final = 1e-8
LARGEST_NORM: Final = 1.0
"""Largest norm of the gradient, over all parameters."""

PATIENCE_S: Final = 60.0
"""How long a daemon or an engine may be unavailable while it restarts."""


# -- what is learned ---------------------------------------------------------------------------------------------------


@dataclass
class State:
    """Everything that training depends on; ``step`` is both the number of batches trained on and the policy version."""

    parameters: Parameters
    mean: Parameters
    square: Parameters
    step: int = 0

    @classmethod
    def initial(cls, seed: int) -> State:
        """Random parameters."""
        parameters = initial_parameters(seed)
        mean, square = ({name: numpy.zeros_like(array) for name, array in parameters.items()} for _ in range(2))
        return cls(parameters, mean, square)

    @classmethod
    def load(cls, path: Path) -> State:
        """What :meth:`save` wrote."""
        with numpy.load(path) as file:
            p, m, s = ({key[2:]: file[key] for key in file if key.startswith(f"{part}/")} for part in "pms")
            return cls(p, m, s, int(file["step"]))

    def save(self, path: Path) -> None:
        """Write everything atomically."""
        named = zip("pms", (self.parameters, self.mean, self.square), strict=True)
        arrays: dict[str, Any] = {f"{part}/{name}": array for part, of in named for name, array in of.items()}
        unfinished = path.with_suffix(".unfinished.npz")
        numpy.savez(unfinished, step=self.step, **arrays)
        unfinished.replace(path)


def update(state: State, batch: Batch) -> float:
    """Learn from a batch; returns the mean distance between our log-probabilities and the engine's.

    It covers the tokens of the current policy and checks the whole loop. It is about 1e-3 (the engine has a 16-bit
    cache), unless tokens carry another version than that of the parameters that produced them.
    """
    arrays = batch.padded(pad_token_id=PAD)
    tokens, mask = arrays["tokens"], arrays["loss_mask"][:, 1:].astype(numpy.float32)
    engine = arrays["logprobs"][:, 1:]
    advantages = batch.advantages(eps=ADVANTAGE_EPSILON)[:, None]
    chosen = one_hot(tokens[:, 1:])

    def loss(parameters: Parameters) -> Any:
        every = log_probabilities(parameters, tokens[:, :-1])
        ratio = np.exp(np.sum(every * chosen, axis=-1) - engine)  # always against the policy that sampled
        gain = np.minimum(ratio * advantages, np.clip(ratio, LOWEST_RATIO, HIGHEST_RATIO) * advantages)
        entropy = -np.sum(np.exp(every) * every, axis=-1)
        return -np.sum((gain + ENTROPY_BONUS * entropy) * mask) / numpy.float32(mask.sum())

    ours = numpy.sum(log_probabilities(state.parameters, tokens[:, :-1]) * chosen, axis=-1)
    newest = batch.padded(loss_mask=batch.loss_mask_against(state.step))["loss_mask"][:, 1:]
    gap = (numpy.abs(ours - engine) * newest).sum() / max(1, newest.sum())
    for number in range(UPDATES):
        _adam(state, grad(loss)(state.parameters), state.step * UPDATES + number + 1)
    state.step = batch.step + 1
    return float(gap)


def _adam(state: State, gradient: Parameters, number: int) -> None:
    """One step of Adam (arXiv:1412.6980), the ``number``-th, after clipping the gradient's norm."""
    norm = float(numpy.sqrt(sum(float(numpy.square(array).sum()) for array in gradient.values())))
    scale = min(1.0, LARGEST_NORM / max(norm, 1e-12))
    first, second = ADAM_DECAYS
    for name, array in gradient.items():
        clipped = array * scale
        state.mean[name] = first * state.mean[name] + (1 - first) * clipped
        state.square[name] = second * state.square[name] + (1 - second) * clipped * clipped
        towards = state.mean[name] / (1 - first**number)
        spread = numpy.sqrt(state.square[name] / (1 - second**number)) + ADAM_EPSILON
        state.parameters[name] = state.parameters[name] - LEARNING_RATE * towards / spread


# -- the loop ----------------------------------------------------------------------------------------------------------


def train(client: RolloutClient, folder: Path, state: State) -> None:
    """Take batches until the run is finished."""
    publish(client, folder, state)  # a killed trainer may have saved these without publishing them
    began = time.perf_counter()
    for batch in client.batches(timeout_s=10 * PATIENCE_S, reconnect_s=PATIENCE_S):
        if batch.step < state.step:
            continue  # trained on before we were killed; asking for the next one acknowledges it
        persist(client.pause_generation)  # a step takes a fifth of a second: without this line the next batch would be
        received = time.perf_counter()  # finished with the old parameters before the new ones are ready
        gap = update(state, batch)
        trained = time.perf_counter()
        note(folder, batch, {"gap": gap, "wait_s": received - began, "train_s": trained - received})
        state.save(folder / "trainer.npz")
        publish(client, folder, state)
        began = time.perf_counter()


def publish(client: RolloutClient, folder: Path, state: State) -> None:
    """Load our parameters into the engine; waits for a daemon or an engine that is restarting.

    Generations in flight are interrupted and continued with the new parameters. Every token is recorded with the
    version that produced it.
    """
    path = folder / f"policy-{state.step % 2}.gguf"  # two files in turn: the engine reads the other one
    write_gguf(state.parameters, path)
    persist(lambda: client.update_weights(path, version=state.step, mode="abort", timeout_s=PATIENCE_S))
    persist(client.continue_generation)


def persist(call: Callable[[], Any]) -> None:
    """Retry a call while the daemon or all engines are unavailable. Each of these calls may be repeated."""
    give_up_at = time.monotonic() + PATIENCE_S
    while True:
        try:
            call()
        except (ConnectionLost, UpdateFailed):
            if time.monotonic() > give_up_at:
                raise
            time.sleep(0.1)
        else:
            return


def note(folder: Path, batch: Batch, more: dict[str, Any]) -> None:
    """Append the figures of a batch to ``progress.jsonl``, for display and plots.

    It is written before the state is saved: a step that is trained on again after a kill appears twice, with the same
    figures.
    """
    rewards: dict[str, list[float]] = {}
    for group in batch.groups:
        rewards.setdefault(group.source, []).extend(group.rewards)
    samples = batch.samples
    line = {
        "step": batch.step,
        "time": time.time(),
        "weights": batch.weights,
        "counts": batch.counts,
        "rewards": {source: float(numpy.mean(values)) for source, values in rewards.items()},
        "samples": len(samples),
        "continued": sum(len(sample.versions) > 1 for sample in samples),
        "versions": sorted({version for sample in samples for version, _ in sample.versions}),
        "staleness": float(batch.staleness().mean()),
        **more,
    }
    with (folder / "progress.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def main() -> None:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Train a tiny llama on the daemon's batches.")
    parser.add_argument("folder", type=Path, help="folder for parameters, the trainer's state and progress.jsonl")
    parser.add_argument("--init", action="store_true", help="write the first parameters and exit")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first parameters")
    parser.add_argument(
        "--socket", help="the daemon's socket (default: $ORCHESTRATOR_SOCKET, then run/orchestrator.sock)"
    )
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    saved = given.folder / "trainer.npz"
    state = State.load(saved) if saved.exists() else State.initial(given.seed)
    if given.init:
        state.save(saved)
        write_gguf(state.parameters, given.folder / f"policy-{state.step % 2}.gguf")
        return
    with RolloutClient(given.socket, client="trainer", takeover=True, connect_timeout_s=PATIENCE_S) as client:
        train(client, given.folder, state)


if __name__ == "__main__":
    main()
