"""The methods of the protocol: what they record, and what they leave to the daemon's control."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from orchestrator.errors import SourceUnknown
from orchestrator.state.mapped import Segments
from orchestrator.state.segments import Record, RecordKind, list_segments
from tests.support.daemon_process import daemon, write_config
from tests.support.paths import ROOT
from tests.support.protocol_client import ProtocolClient, Refused

DONE_TO_THE_RUN = ("WeightSet", "SourcePaused", "SourceResumed", "SourcesChanged", "EngineAdded", "EngineDrained")

METHODS = (ROOT / "docs" / "protocol.md").read_text().partition("## Methods")[2].partition("\n## ")[0]


def recorded(state: Path) -> list[str]:
    """The tags of all events in the log."""
    events = [
        json.loads(bytes(record.body))["event"]
        for number in list_segments(state)
        for record in Segments(state).get(number).records()
        if isinstance(record, Record) and record.kind is RecordKind.EVENT
    ]
    assert events
    return events


def test_a_pause_and_its_end_are_recorded_and_told_once(tmp_path: Path) -> None:
    with daemon(write_config(tmp_path)) as process:
        with process.connect(client="an operator") as client:
            client.resume("easy")
            for _ in range(2):
                client.pause("easy")
            for _ in range(2):
                client.resume("easy")
            for method in (client.pause, client.resume):
                with pytest.raises(SourceUnknown, match="neither"):
                    method("neither")
            client.pause("hard")
        assert process.stop() == 0
        told = [line["message"] for line in process.log if "by an operator" in line["message"]]
    assert [line.split(" from ")[0] for line in told] == ["easy is paused", "easy is resumed", "hard is paused"]
    assert [tag for tag in recorded(tmp_path / "state") if tag in ("pause", "resume")] == ["pause", "resume", "pause"]


def test_the_methods_are_those_of_the_protocol_page(tmp_path: Path) -> None:
    with daemon(write_config(tmp_path)) as process:
        process.connect().close()
        with (
            ProtocolClient(str(process.socket)) as client,
            pytest.raises(Refused, match="unknown method 'train'") as refused,
        ):
            client.request("train")
    rows = re.findall(r"^\| (`[a-z_]+`(?:, `[a-z_]+`)*) \|[^|]*\|[^|]*\|[^|]*\|$", METHODS, re.MULTILINE)
    assert len(rows) > 15
    documented = {name.strip("`") for row in rows for name in row.split(", ")}
    assert set(str(refused.value).partition("use one of ")[2].split(", ")) == documented


def test_what_is_done_to_a_run_is_recorded_by_its_control_alone() -> None:
    """The consumer's side asks for it, and does not know these events."""
    for path in (ROOT / "orchestrator" / "consumer").rglob("*.py"):
        text = path.read_text()
        assert not [event for event in DONE_TO_THE_RUN if event in text], path
