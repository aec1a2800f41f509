"""Forty batches of a llama.cpp server, with a SIGKILL in the middle, through a client that knows only the page."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.daemon_process import DaemonProcess, daemon, write_config
from tests.support.paths import ROOT
from tests.support.protocol_client import DTYPES, Batch, Group, ProtocolClient

pytestmark = pytest.mark.timeout(180)

BATCHES = 40
KILLED_AT = 20
GROUPS = 8
SAMPLES = 4
MAX_NEW_TOKENS = 24
END_OF_SEQUENCE = 257
SOURCES = ("easy", "hard")


def weights(step: int) -> dict[str, Fraction]:
    """What the formulas of the config say, exactly."""
    way = min(Fraction(step, 40), Fraction(1))
    return {"easy": Fraction(9, 10) - Fraction(8, 10) * way, "hard": Fraction(1, 10) + Fraction(8, 10) * way}


def config(folder: Path) -> Path:
    return write_config(
        folder,
        rollout={"rollout_batch_size": GROUPS, "n_samples_per_prompt": SAMPLES},
        sampling={"max_new_tokens": MAX_NEW_TOKENS},
        engines=[{"kind": "embedded", "slots": 8, "context_tokens": 256, "threads": 1}],
        data_source_weights=[
            "lambda step: 0.9 - 0.8 * min(step / 40, 1.0)",
            "lambda step: 0.1 + 0.8 * min(step / 40, 1.0)",
        ],
    )


@dataclass(frozen=True)
class Run:
    batches: list[Batch]
    status: dict[str, Any]
    log: list[dict[str, Any]]
    exit_code: int
    model: Path
    again: Batch
    """The batch that was in hand at the SIGKILL, as it came from the daemon's second life."""

    @property
    def groups(self) -> list[Group]:
        return [group for batch in self.batches for group in batch.groups]


def connect(process: DaemonProcess) -> ProtocolClient:
    process.connect().close()  # waits until the daemon listens
    return ProtocolClient(str(process.socket))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("run")
    batches = []
    with daemon(config(folder)) as process:
        with connect(process) as client:
            for _ in range(KILLED_AT):
                batches.append(client.get_batch(timeout_s=50))
                client.ack(batches[-1].result["lease"])
            batches.append(client.get_batch(timeout_s=50))
            process.kill()
        process.start()
        with connect(process) as client:
            again = client.get_batch(timeout_s=50)
            client.ack(again.result["lease"])
            while len(batches) < BATCHES:
                batches.append(client.get_batch(timeout_s=50))
                client.ack(batches[-1].result["lease"])
            status = client.request("status")
        exit_code = process.stop()
        return Run(batches, status, process.log, exit_code, folder / "state" / "tiny-random-bytes.gguf", again)


def test_a_killed_daemon_repeats_the_batch_in_hand_and_no_other(run: Run) -> None:
    assert run.again.result == run.batches[KILLED_AT].result, "the same lease, step and counts"
    assert run.again.payload == run.batches[KILLED_AT].payload
    leases = [batch.result["lease"] for batch in run.batches]
    assert len(set(leases)) == BATCHES
    assert run.exit_code == 0
    assert run.status["problems"] == []
    assert [line["message"] for line in run.log if line["log.level"] != "info" and not is_slow_callback(line)] == []


def is_slow_callback(line: dict[str, Any]) -> bool:
    """What asyncio's debug mode says of every callback above 0.1 s; a busy machine has many."""
    return line.get("log") == {"logger": "asyncio"} and line["message"].startswith("Executing ")


def test_every_batch_follows_the_weights_to_less_than_a_group(run: Run) -> None:
    owed = dict.fromkeys(SOURCES, Fraction(0))
    for step, batch in enumerate(run.batches):
        assert batch.result["step"] == step
        assert batch.result["weights"] == pytest.approx({name: float(w) for name, w in weights(step).items()})
        received = Counter(group.header["source"] for group in batch.groups)
        assert batch.result["counts"] == {name: received[name] for name in SOURCES}
        assert len(batch.groups) == batch.result["groups"] == GROUPS
        for name, weight in weights(step).items():
            owed[name] += GROUPS * weight - received[name]
            assert abs(owed[name]) < 1, f"{name} at step {step}"


def test_every_group_is_handed_out_once_or_accounted_for(run: Run) -> None:
    indices = [group.header["group_index"] for group in run.groups]
    samples = [sample["index"] for group in run.groups for sample in group.header["samples"]]
    prompts = [tuple(group.header[key] for key in ("source", "epoch", "prompt_index")) for group in run.groups]
    assert len(set(indices)) == len(indices) == BATCHES * GROUPS
    assert len(set(samples)) == len(samples) == BATCHES * GROUPS * SAMPLES
    assert len(set(prompts)) == len(prompts), "each prompt once in an epoch"
    assert 0 <= min(indices) <= max(indices) < run.status["next_group_index"]

    received = Counter(group.header["source"] for group in run.groups)
    elsewhere = 0
    for name in SOURCES:
        places = run.status["sources"][name]["groups"]
        rest = sum(places[key] for key in ("in_flight", "buffered", "leased", "dropped"))
        assert places["acknowledged"] == received[name]
        assert places["launched"] == places["acknowledged"] + rest
        elsewhere += rest
    assert len(indices) + elsewhere == run.status["next_group_index"]


def test_columns_add_up(run: Run) -> None:
    for group in run.groups:
        header, columns = group.header, group.columns
        assert header["n"] == len(header["samples"]) == SAMPLES
        assert header["prompt"] == f"{header['source']} {header['prompt_index']}="
        assert columns["prompt_tokens"].astype("u1").tobytes().decode() == header["prompt"]

        assert set(header["columns"]) == set(columns)
        assert len(group.payload) % 8 == 0
        after = 0
        for name, (dtype, begin, end) in sorted(header["columns"].items(), key=lambda item: item[1][1]):
            assert begin % 8 == 0
            assert after <= begin <= end <= len(group.payload), name
            assert columns[name].dtype == np.dtype(DTYPES[dtype])
            after = end

        for offsets, counted in (
            ("response_offsets", ("response_tokens", "logprobs", "loss_mask")),
            ("text_offsets", ("text",)),
        ):
            assert len(columns[offsets]) == SAMPLES + 1
            assert columns[offsets][0] == 0
            assert (np.diff(columns[offsets]) >= 0).all()
            assert {len(columns[name]) for name in counted} == {columns[offsets][-1]}
        assert (columns["loss_mask"] == 1).all()
        assert (columns["logprobs"] <= 0).all()
        assert np.isfinite(columns["logprobs"]).all()


def test_samples_say_how_they_ended_and_what_they_earned(run: Run) -> None:
    ends: Counter[str] = Counter()
    rewards: Counter[float] = Counter()
    for group in run.groups:
        for i, sample in enumerate(group.header["samples"]):
            tokens, text = group.response("response_tokens", i).tolist(), group.text(i)
            assert 1 <= sum(count for _, count in sample["versions"]) == len(tokens) <= MAX_NEW_TOKENS
            assert {version for version, _ in sample["versions"]} == {0}
            assert END_OF_SEQUENCE not in tokens[:-1]
            if tokens[-1] == END_OF_SEQUENCE:
                assert sample["status"] == "completed"
                tokens.pop()
            else:
                assert (sample["status"], len(tokens)) == ("truncated", MAX_NEW_TOKENS)
            assert bytes(tokens).decode(errors="replace") == text, "one token is one byte in this model"
            assert sample["reward"] == float(group.header["label"] in text)
            ends[sample["status"]] += 1
            rewards[sample["reward"]] += 1
    assert set(ends) == {"completed", "truncated"}
    assert set(rewards) == {0.0, 1.0}


def test_log_probabilities_are_those_of_a_second_scoring(run: Run) -> None:
    with scoring_server(run.model) as url:
        for step in (0, 9, KILLED_AT - 1, KILLED_AT + 1, 30, BATCHES - 1):
            group = run.batches[step].groups[step % GROUPS]
            assert group.header["logprobs"] == "temperature"
            sample = step % SAMPLES
            tokens = [*group.columns["prompt_tokens"].tolist(), *group.response("response_tokens", sample).tolist()]
            given = group.response("logprobs", sample)
            begin = len(tokens) - len(given)
            again = [score(url, tokens[:at], tokens[at]) for at in range(begin, len(tokens))]
            assert given == pytest.approx(again, abs=1e-3), f"step {step}"


@contextmanager
def scoring_server(model: Path, context_tokens: int = 256) -> Iterator[str]:
    """The address of another server on the same model; it ends with its standard input."""
    command = [sys.executable, "-m", "orchestrator.engines.embedded.server", str(model), "1", str(context_tokens), "1"]
    root = ROOT
    with (model.parent / "scoring.stderr").open("wb") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=root
        )
    with process:  # closes the pipes, then waits
        assert process.stdout is not None
        yield process.stdout.readline().strip()


def score(url: str, prefix: list[int], token: int) -> float:
    """The model's own log-probability of a token after a prefix."""
    wanted = {"prompt": prefix, "n_predict": 1, "n_probs": 300, "temperature": 1}
    request = urllib.request.Request(f"{url}/completion", json.dumps(wanted).encode())
    with urllib.request.urlopen(request, timeout=30) as answer:
        [drawn] = json.load(answer)["completion_probabilities"]
    return {entry["id"]: entry["logprob"] for entry in [*drawn["top_logprobs"], drawn]}[token]
