"""A state directory of the last build before the modules moved: read wholly, and written under the same names."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

from orchestrator.archive import find_step, read_groups
from orchestrator.client import Batch, RolloutClient
from orchestrator.core.ledger.events import AddedSource, Event, SourceFacts, decode_event, encode_event
from orchestrator.core.ledger.ledger import SourceSize
from orchestrator.state.mapped import Segments
from orchestrator.state.recovery import recover
from orchestrator.state.segments import Record, RecordKind, list_segments
from orchestrator.state.snapshots import list_snapshots, read_snapshot
from tests.campaigns.checks import until
from tests.daemon.test_end_to_end import take
from tests.support.daemon_process import daemon, write_config
from tests.support.paths import STATE_V2
from tests.support.state_histories import facts

EXPECTED: dict[str, Any] = json.loads((STATE_V2 / "expected.json").read_text())
SIZES = {"easy": SourceSize(100), "hard": SourceSize(100)}
ENGINE = {"kind": "scripted", "name": "first", "tokens_per_s": 60.0, "max_in_flight": 16, "length": [4, 24]}


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A copy, with the hard link that a checkpoint has to its log."""
    directory = tmp_path / "state"
    shutil.copytree(STATE_V2, directory, ignore=shutil.ignore_patterns("expected.json"))
    os.link(directory / "log-00000001.rol", directory / "checkpoints" / "two" / "log-00000001.rol")
    return directory


def engines(client: RolloutClient) -> list[list[Any]]:
    return [[engine["name"], engine["state"], engine["policy_version"]] for engine in client.engines()]


def tokens(batch: Batch) -> list[list[Any]]:
    return [[g.group_index, s.index, s.response_tokens.tolist()] for g in batch.groups for s in g.samples]


def samples(batch: Batch) -> list[list[Any]]:
    """Of each sample what makes it this one, as the older build's fixture has it."""
    return [
        [g.group_index, s.index, s.reward, s.response_tokens.tolist(), [list(version) for version in s.versions]]
        for g in batch.groups
        for s in g.samples
    ]


# -- reading -----------------------------------------------------------------------------------------------------------


def test_the_ledger_is_what_the_older_build_knew(state: Path) -> None:
    ledger, recovery = recover(state, SIZES, "fresh")
    assert recovery.problems == []
    assert recovery.snapshot == 3
    assert recovery.records > 10, "most of the second life is in the log, and not in the snapshot"
    assert facts(ledger) == EXPECTED["facts"]
    assert any(partials for _, partials in EXPECTED["facts"]["sources"]["easy"]["in_flight"].values())


def test_the_snapshot_before_and_the_whole_log_give_the_same(state: Path) -> None:
    (state / "snapshot-00000003.json").unlink()
    assert facts(recover(state, SIZES, "fresh")[0]) == EXPECTED["facts"]


def test_a_daemon_goes_on_with_all_of_it(state: Path, tmp_path: Path) -> None:
    config = write_config(
        tmp_path,
        engines=[ENGINE],
        sampling={"max_new_tokens": 24},
        rollout={"chunk_tokens": 4, "rollout_batch_size": 2},
        archive={"path": "archive"},
    )
    known = EXPECTED["facts"]
    with daemon(config) as process, process.connect() as client:
        status = client.status()
        assert (status["step"], status["policy_version"]) == (known["step"], known["version"])
        for name, source in status["sources"].items():
            then = known["sources"][name]
            assert source["weight"]["text"] == EXPECTED["weights"][name]
            assert source["weight"]["set_at_run_time"] == (then["weight"] is not None)
            assert source["paused"] == then["paused"]
            assert source["handed_out"] == then["counts"][1]
        # A new scripted engine has nothing: the one in use was given the parameters of the version again. One that is
        # being drained gets no new requests, so none are loaded for it; the older build did the same.
        told = [["first", "up", 3], ["second", "draining", None]]
        until(lambda: engines(client) == told, "both engines as they were")
        entries = client.checkpoints()
        assert [{key: entry[key] for key in EXPECTED["checkpoints"][0]} for entry in entries] == EXPECTED["checkpoints"]
        assert not any(client.verify_checkpoints().values())

        batch = client.get_batch(timeout_s=30)
        header = {key: value for key, value in EXPECTED["batch"].items() if key != "samples"}
        assert {key: getattr(batch, key) for key in header} == header
        assert samples(batch) == EXPECTED["batch"]["samples"]
        client.ack(batch.lease)

        client.resume("hard")
        [cut] = [int(index) for index, (_, partials) in known["sources"]["easy"]["in_flight"].items() if partials]
        found = None
        while found is None:
            batch = client.get_batch(timeout_s=30)
            found = next((group for group in batch.groups if group.group_index == cut), None)
            client.ack(batch.lease)
        assert {sample.versions[0][0] for sample in found.samples} == {2}, "it went on from the tokens that it had"
        until(lambda: client.status()["archive"]["waiting"] == 0, "an archive that has all batches")
        archived = read_groups(find_step(tmp_path / "archive", 2)[0])
        assert [group["group_index"] for group in archived] == list(map(int, known["unarchived"]["2"]))

        assert client.load("two")["step"] == EXPECTED["checkpoints"][0]["step"]
        client.set_policy_version(1)
        batch = client.get_batch(timeout_s=30)
        assert batch.step == EXPECTED["checkpoint_lease_step"]
        assert tokens(batch) == EXPECTED["checkpoint_batch"]
        client.ack(batch.lease)
        take(client, 1)
        assert process.stop() == 0
    with daemon(config) as process, process.connect() as client:
        assert client.status()["step"] == EXPECTED["checkpoints"][0]["step"] + 1


# -- writing -----------------------------------------------------------------------------------------------------------


def test_a_snapshot_is_written_as_the_older_build_wrote_it(state: Path) -> None:
    """The older build's snapshot of the same ledger: every key, every place, in the same order."""
    ledger, _ = recover(state, SIZES, "fresh")
    assert msgspec.json.encode(ledger.snapshot()).decode() == json.dumps(EXPECTED["snapshot"], separators=(",", ":"))


def test_a_snapshot_of_the_older_build_is_one_of_today(state: Path) -> None:
    """Reading one and writing it again changes nothing."""
    for number in list_snapshots(state):
        data = read_snapshot(state, number)
        ledger, _ = recover(state, SIZES, "fresh")
        ledger.load(data["ledger"], Segments(state).frame)
        assert json.loads(msgspec.json.encode(ledger.snapshot())) == data["ledger"]


def test_events_keep_their_tags_and_fields() -> None:
    """New fields come after the old ones and have defaults, so that old logs stay readable."""
    today = {kind.__struct_config__.tag: kind for kind in get_args(Event)}
    for tag, fields in EXPECTED["events"].items():
        now = list(today[tag].__struct_fields__)
        assert now[: len(fields)] == fields
        assert len(today[tag].__struct_defaults__) >= len(now) - len(fields)
    for kind in (SourceFacts, AddedSource):
        assert list(kind.__struct_fields__) == EXPECTED["nested"][kind.__name__]


def test_events_of_the_older_build_are_written_as_it_wrote_them(state: Path) -> None:
    tags = set()
    for number in list_segments(state):
        for record in Segments(state).get(number).records():
            assert isinstance(record, Record)
            if record.kind is RecordKind.EVENT:
                assert encode_event(decode_event(record.body)) == bytes(record.body)
                tags.add(json.loads(bytes(record.body))["event"])
    assert tags >= {"launched", "batch", "ack", "archived", "version", "weight", "pause", "resume", "held"}
    assert tags >= {"engine_added", "engine_drained", "engine_removed"}
