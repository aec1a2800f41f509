"""``docs/protocol.md`` says what is so: its dumps decode, its client runs, its tables are complete."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from array import array
from pathlib import Path

import pytest

from orchestrator.client import RolloutClient, RolloutGroup
from orchestrator.client.remote_errors import ERROR_TYPES
from orchestrator.consumer.methods import params as methods
from orchestrator.errors import AlreadyRunning, CorruptState, PromptFileError
from orchestrator.frames import encode_frame, encode_group
from orchestrator.records import Group, Prompt, Sample, SampleStatus
from tests.support.consumer_stub import DEADLINE_S, stub_daemon
from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "protocol.md").read_text()


def block(kind: str) -> str:
    found = re.search(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL)
    assert found is not None
    return found[1]


def undumped(kind: str) -> bytes:
    """The bytes of a dump: 8 digits of offset, then up to 39 columns of hexadecimal."""
    data = bytearray()
    for line in block(kind).splitlines():
        assert int(line[:8], 16) == len(data)
        data += bytes.fromhex(line[10:49])
    return bytes(data)


def test_the_request_of_the_page_is_the_bytes_of_the_page() -> None:
    assert undumped("hexdump request") == encode_frame({"id": 7, "method": "ack", "params": {"lease": "k3.0.0.0"}})


def test_the_group_of_the_page_is_the_bytes_of_the_page() -> None:
    sample = Sample(index=136, status=SampleStatus.COMPLETED, finish_reason="stop", reward=1.0, text="4.")
    sample.extend([19, 13], [-0.25, -0.5], 3)
    prompt = Prompt("math", 4, 0, "2+2=", label="4")
    assert undumped("hexdump group") == encode_group(Group("math", 17, prompt, array("i", [17, 10, 17, 28]), [sample]))
    [group] = RolloutGroup.from_frames(undumped("hexdump group"))
    assert (group.samples[0].text, group.samples[0].logprobs.tolist()) == ("4.", [-0.25, -0.5])


def test_every_error_that_an_answer_may_carry_is_in_the_table() -> None:
    table = PAGE[PAGE.index("## Error codes") : PAGE.index("## Versions of the protocol")]
    at_start_only = {kind.code for kind in (AlreadyRunning, CorruptState, PromptFileError)}
    assert set(re.findall(r"^\| `(\w+)` ", table, re.MULTILINE)) == set(ERROR_TYPES) - at_start_only


def test_every_method_of_the_table_is_a_method_of_the_client() -> None:
    table = PAGE[PAGE.index("## Methods") : PAGE.index("**`get_batch`** waits")]
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", table, re.MULTILINE)
    names = {name for row in rows for name in re.findall(r"\w+", row)}
    ours = {name for name in vars(RolloutClient) if not name.startswith("_")}
    engines = {"add_engine", "drain_engine", "remove_engine", "resume_engine"}
    sources = {"add_source", "remove_source", "restore_source"}
    assert ours - names == {"batches", "close", "connect", "receive_batch", "request_batch"} | engines | sources
    assert names <= ours


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        ("hello", methods.Hello),
        ("get_batch", methods.GetBatch),
        ("ack", methods.Ack),
        ("nack", methods.Nack),
        ("cancel", methods.Cancel),
        ("set_policy_version", methods.SetPolicyVersion),
        ("pause_generation", methods.PauseGeneration),
        ("update_weights", methods.UpdateWeights),
        ("engines", methods.Engines),
        ("save", methods.Save),
        ("load", methods.Load),
        ("verify_checkpoints", methods.VerifyCheckpoints),
        ("set_weight", methods.SetWeight),
        ("pause", methods.Source),
    ],
)
def test_every_parameter_of_the_daemon_is_in_the_table(method: str, kind: type) -> None:
    [row] = re.findall(rf"^\| `{method}`[^|]*\|([^|]*)\|", PAGE, re.MULTILINE)
    assert set(re.findall(r"`(\w+)(?:\?[^`]*)?`", row)) == set(kind.__struct_fields__)  # type: ignore[attr-defined]


def test_the_client_of_the_page_runs(tmp_path: Path) -> None:
    program = tmp_path / "client.py"
    program.write_text(block("python client"))
    with stub_daemon(tmp_path, 2) as daemon:
        command = [sys.executable, str(program), str(daemon.path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, cwd=tmp_path)
        assert (done.stderr, daemon.acked) == ("", [0, 1])
    assert done.stdout.splitlines() == [
        "0 source0 [0.0, 1.0] 7",
        "0 source1 [1.0, 1.0] 7",
        "1 source0 [0.0, 1.0] 7",
        "1 source1 [1.0, 1.0] 7",
        "finished finished",
    ]


def test_scattering_to_ranks_gives_each_its_share_and_acknowledges_when_all_are_done(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with stub_daemon(tmp_path, 2, groups=3) as daemon:
        command = [sys.executable, "-m", "examples.scatter_ranks", "--world-size=3", f"--port={port}"]
        command += [f"--socket={daemon.path}"]
        ranks = []
        try:
            for rank in (1, 2, 0):  # rank 0 last: the others wait for it
                ranks.append(
                    subprocess.Popen([*command, f"--rank={rank}"], stdout=subprocess.PIPE, text=True, cwd=ROOT)
                )
            outputs = [rank.communicate(timeout=DEADLINE_S)[0] for rank in ranks]
        finally:
            for process in ranks:
                process.kill()
                process.communicate()
        said = [f"rank {rank}: 1 groups, 7 response tokens\n" * 2 for rank in (1, 2, 0)]
        assert outputs == [*said[:2], f"rank 0 listens\n{said[2]}"]
        assert daemon.acked == [0, 1]
