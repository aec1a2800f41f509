"""The demo's model: what it computes is what llama.cpp computes from its file, and its gradient is right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from autograd import grad

from examples.curriculum_learning.tiny_llama import (
    VOCABULARY,
    initial_parameters,
    log_probabilities,
    one_hot,
    write_gguf,
)
from orchestrator.engines.embedded.engine import EmbeddedEngine
from tests.support.engine_pools import ask, request, running_engine

PROMPT = [14, 7, 0, 3, 10, 11]


def lively(seed: int) -> dict[str, np.ndarray]:  # type: ignore[type-arg]
    """Parameters whose predictions differ from token to token, as those of a trained model do."""
    parameters = initial_parameters(seed)
    return parameters | {"output.weight": parameters["output.weight"] * 15}


def test_it_has_the_promised_size_and_knows_nothing() -> None:
    parameters = initial_parameters(0)
    assert sum(array.size for array in parameters.values()) == 43_200
    assert {array.dtype for array in parameters.values()} == {np.dtype(np.float32)}
    every = log_probabilities(parameters, np.array([PROMPT]))
    assert every.dtype == np.float32
    assert np.exp(every).sum(axis=-1) == pytest.approx(1, abs=1e-5)
    assert np.abs(np.exp(every) * VOCABULARY - 1).max() < 1


async def test_its_log_probabilities_are_those_of_the_server(tmp_path: Path) -> None:
    parameters = lively(3)
    write_gguf(parameters, tmp_path / "policy.gguf")
    engine = EmbeddedEngine(
        name="own", workdir=tmp_path, model=tmp_path / "policy.gguf", slots=2, context_tokens=64, threads=1
    )
    gaps, spreads = [], []
    async with running_engine(engine):
        for seed in range(8):
            got = await ask(engine, request(PROMPT, n=8, seed=seed))
            tokens = np.array([PROMPT + got.tokens])
            every = log_probabilities(parameters, tokens[:, :-1])
            ours = (every * one_hot(tokens[:, 1:])).sum(axis=-1)[0, len(PROMPT) - 1 :]
            gaps.append(np.abs(ours - np.array(got.logprobs)).max())
            spreads.append(np.std(got.logprobs))
    assert np.mean(spreads) > 0.3, "agreement on a flat distribution would say nothing"
    assert max(gaps) < 0.02


def test_its_gradient_is_that_of_its_differences() -> None:
    parameters = {name: array.astype(np.float64) for name, array in lively(1).items()}
    tokens = np.array([PROMPT])

    def loss(of: dict[str, np.ndarray]) -> float:  # type: ignore[type-arg]
        return -(log_probabilities(of, tokens[:, :-1]) * one_hot(tokens[:, 1:])).sum()

    gradient = grad(loss)(parameters)
    draw = np.random.default_rng(0)
    for name, array in parameters.items():
        direction = draw.standard_normal(array.shape)
        step = 1e-5 * direction
        difference = loss(parameters | {name: array + step}) - loss(parameters | {name: array - step})
        assert difference / 2e-5 == pytest.approx((gradient[name] * direction).sum(), rel=1e-3, abs=1e-6), name
