"""A whole run on a real llama.cpp server, read by a client that was written from the protocol's page alone."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .daemon_process import daemon, write_config
from .page_client import Frame, PageClient

pytestmark = pytest.mark.timeout(180)

BATCHES, GROUPS, SAMPLES, LONGEST = 40, 8, 4, 48
END_OF_SEQUENCE = 257
KILLED_AFTER = 20


def weights(step: int) -> dict[str, Fraction]:
    """The two schedules of the config, computed apart from the daemon."""
    done = min(Fraction(step, 40), Fraction(1))
    return {"easy": Fraction(9, 10) - Fraction(8, 10) * done, "hard": Fraction(1, 10) + Fraction(8, 10) * done}


def check_columns(group: Frame) -> None:
    """All that the page promises of a group's columns."""
    header = group.header
    offsets, texts = group.column("response_offsets"), group.column("text_offsets")
    tokens, logprobs, mask = (group.column(name) for name in ("response_tokens", "logprobs", "loss_mask"))
    assert header["n"] == len(header["samples"]) == SAMPLES
    assert len(offsets) == len(texts) == SAMPLES + 1
    assert offsets[0] == texts[0] == 0
    assert (np.diff(offsets) >= 0).all()
    assert (np.diff(texts) >= 0).all()
    assert offsets[-1] == len(tokens) == len(logprobs) == len(mask)
    assert texts[-1] == len(group.column("text"))
    assert bytes(group.column("prompt_tokens").astype(np.uint8)).decode() == header["prompt"]
    assert (mask == 1).all()
    assert (logprobs <= 0).all()
    for i, sample in enumerate(header["samples"]):
        length = int(offsets[i + 1] - offsets[i])
        assert sum(count for _, count in sample["versions"]) == length
        text = bytes(group.sample_column("text", i)).decode()
        assert sample["reward"] == float(header["label"] in text)
        if sample["status"] == "completed":
            assert group.sample_column("response_tokens", i)[-1] == END_OF_SEQUENCE
        else:
            assert (sample["status"], length) == ("truncated", LONGEST)


@contextmanager
def scoring_server(model: Path) -> Iterator[str]:
    """The address of a second llama.cpp server on the same model."""
    command = [sys.executable, "-m", "orchestrator.engines.embedded_server", str(model), "1", "512", "1"]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=Path(__file__).parents[1],
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        try:
            yield process.stdout.readline().decode().strip()
        finally:
            process.stdin.close()
            process.kill()


def score(url: str, prefix: list[int], token: int) -> float:
    """The raw log-probability of one token after a prefix, as the server gives it."""
    body = {"prompt": prefix, "n_predict": 1, "n_probs": 300, "temperature": 1.0, "samplers": ["temperature"]}
    request = urllib.request.Request(f"{url}/completion", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=30) as answer:
        [entry] = json.load(answer)["completion_probabilities"]
    return {candidate["id"]: candidate["logprob"] for candidate in entry["top_logprobs"]}[token]


def config(folder: Path) -> Path:
    return write_config(
        folder,
        engines=[{"kind": "embedded", "slots": 8, "context_tokens": 256, "threads": 1}],
        rollout={"rollout_batch_size": GROUPS, "n_samples_per_prompt": SAMPLES},
        sampling={"max_new_tokens": LONGEST},
        data_source_weights=[
            "lambda step: 0.9 - 0.8 * min(step / 40, 1.0)",
            "lambda step: 0.1 + 0.8 * min(step / 40, 1.0)",
        ],
    )


def test_forty_batches_of_a_real_engine(tmp_path: Path) -> None:
    taken: list[tuple[dict[str, Any], list[Frame]]] = []
    with daemon(config(tmp_path)) as process:
        process.connect().close()
        client = PageClient(str(process.socket))
        for step in range(BATCHES):
            batch = client.get_batch()
            if step == KILLED_AFTER:  # in the middle of the run, with this batch not acknowledged
                process.kill()
                client.close()
                process.start().connect().close()
                client = PageClient(str(process.socket))
                again = client.get_batch()
                assert again[0] == batch[0]
                assert [group.raw for group in again[1]] == [group.raw for group in batch[1]]
            client.ack(batch[0]["lease"])
            taken.append(batch)
        status, _ = client.request("status")
        client.close()
        check_counts(taken)
        check_indices(taken, status)
        for _, groups in taken:
            for group in groups:
                check_columns(group)
        with scoring_server(tmp_path / "state" / "tiny-random-bytes.gguf") as url:
            for _, groups in taken[::8]:
                check_logprobs(url, groups[0])
        assert process.stop() == 0


def check_counts(taken: list[tuple[dict[str, Any], list[Frame]]]) -> None:
    owed = dict.fromkeys(("easy", "hard"), Fraction(0))
    for step, (result, groups) in enumerate(taken):
        assert result["step"] == step
        sources = [group.header["source"] for group in groups]
        assert {name: sources.count(name) for name in owed} == result["counts"]
        assert len(groups) == GROUPS
        for name, weight in weights(step).items():
            assert result["weights"][name] == pytest.approx(float(weight))
            owed[name] += GROUPS * weight - sources.count(name)
            assert abs(owed[name]) < 1


def check_indices(taken: list[tuple[dict[str, Any], list[Frame]]], status: dict[str, Any]) -> None:
    groups = [group.header["group_index"] for _, batch in taken for group in batch]
    samples = [s["index"] for _, batch in taken for group in batch for s in group.header["samples"]]
    assert len(set(groups)) == len(groups) == BATCHES * GROUPS
    assert len(set(samples)) == len(samples) == BATCHES * GROUPS * SAMPLES
    launched = 0
    for name, source in status["sources"].items():
        places = source["groups"]
        acknowledged = sum(result["counts"][name] for result, _ in taken)
        assert places["acknowledged"] == acknowledged
        rest = sum(places[key] for key in ("in_flight", "buffered", "leased", "acknowledged", "dropped"))
        assert places["launched"] == rest
        launched += places["launched"]
    assert launched == status["next_group_index"] > max(groups)


def check_logprobs(url: str, group: Frame) -> None:
    """A second scoring of the first sample's tokens agrees."""
    prompt = group.column("prompt_tokens").tolist()
    tokens = group.sample_column("response_tokens", 0).tolist()
    given = group.sample_column("logprobs", 0)
    scored = [score(url, prompt + tokens[:i], token) for i, token in enumerate(tokens)]
    assert given == pytest.approx(scored, abs=1e-3)
