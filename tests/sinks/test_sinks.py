"""Sinks of the metrics: what they are given is what the daemon says, and nothing that they do holds anything up."""

from __future__ import annotations

import importlib.util
import json
import os
import sqlite3
import struct
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
import structlog
from structlog.testing import LogCapture

from orchestrator.config import load_config, sink_options
from orchestrator.errors import ConfigError
from orchestrator.sinks import MetricsFile, PackageSink, SinkFeed, StepFigures, build_feeds, read_steps
from orchestrator.sinks import feed as feed_module
from tests.support.daemon_process import daemon, write_config

pytestmark = pytest.mark.timeout(180)

METRICS = {"rollout/easy/weight": 0.25, "rollout/easy/raw_reward/mean": 0.5, "rollout/trainer_wait_s": 0.0}


def figures(step: int) -> StepFigures:
    return StepFigures(step, 7, 1_700_000_000.0 + step, {**METRICS, "rollout/hard/weight": step / 100})


class Watched:
    """A feed at work, and what it logs."""

    def __init__(self, feed: SinkFeed, log: LogCapture) -> None:
        self.feed = feed
        self.log = log

    async def until(self, condition: Callable[[], bool]) -> None:
        with anyio.fail_after(60):
            while not condition():  # noqa: ASYNC110 - a feed tells nobody
                await anyio.sleep(0.01)

    def levels(self) -> list[str]:
        return [entry["log_level"] for entry in self.log.entries]


@asynccontextmanager
async def at_work(sink: Any, **options: Any) -> AsyncIterator[Watched]:
    log = LogCapture()
    feed = SinkFeed("test", "here", sink, log=structlog.wrap_logger(None, processors=[log]), **options)
    async with anyio.create_task_group() as tasks:
        await tasks.start(feed.run)
        yield Watched(feed, log)
        with anyio.fail_after(60):
            await feed.close()


def package(folder: Path, **options: Any) -> PackageSink:
    return PackageSink({"folder": str(folder)}, service="tests.support.sink_services.serve", **options)


def taken(folder: Path) -> list[Any]:
    return [json.loads(line) for line in (folder / "taken").read_text().splitlines()]


# -- the feed ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mood", "said"),
    [
        ("hang", "no answer within 0.5 s; its worker process was killed"),
        ("die", "was killed by signal 9"),
        ("no room on the server", "no room on the server"),
    ],
)
async def test_a_sink_that_misbehaves_is_named_loses_the_oldest_and_gets_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mood: str, said: str
) -> None:
    monkeypatch.setattr(feed_module, "FIRST_RETRY_S", 0.01)
    (tmp_path / "mood").write_text(mood)
    async with at_work(package(tmp_path, call_deadline_s=0.5), max_queued=40) as watched:
        feed = watched.feed
        for step in range(100):
            feed.offer(figures(step))  # no await: what a batch costs does not depend on a sink
        assert (feed.statistics().queued, feed.statistics().lost) == (40, 60)
        await watched.until(lambda: feed.statistics().failures > 1)
        fault = feed.statistics().fault
        assert fault is not None
        assert said in fault
        assert watched.levels() == ["warning"], "once, not at every try"
        (tmp_path / "mood").unlink()
        await watched.until(lambda: feed.statistics().written == 40)
        assert feed.statistics().fault is None
        assert watched.levels() == ["warning", "info"]
    assert [step["step"] for step in taken(tmp_path)[:-1]] == list(range(60, 100))
    assert taken(tmp_path)[-1] == "finished"
    assert taken(tmp_path)[0]["metrics"] == {**METRICS, "rollout/hard/weight": 0.6}


class CountedFile(MetricsFile):
    """Remembers how many steps it was given at a time."""

    calls: tuple[int, ...] = ()

    async def write(self, steps: Sequence[StepFigures]) -> None:
        self.calls += (len(steps),)
        await super().write(steps)


async def test_steps_in_quick_succession_are_given_to_a_sink_together(tmp_path: Path) -> None:
    sink = CountedFile(tmp_path, max_bytes=1 << 20, keep=1)
    async with at_work(sink) as watched:
        feed = watched.feed
        feed.offer(figures(0))
        await watched.until(lambda: feed.statistics().written == 1)
        for step in range(1, 31):
            feed.offer(figures(step))
            for _ in range(3):  # longer than a write takes
                await anyio.to_thread.run_sync(os.stat, tmp_path)
        await watched.until(lambda: feed.statistics().written == 31)
    assert sink.calls[0] == 1, "the first is there at once"
    assert sum(sink.calls) == 31
    assert len(sink.calls) < 15
    assert [step["step"] for step in read_steps(tmp_path, 100)] == list(range(31))


async def test_a_sink_that_cannot_begin_ends_nothing_and_what_it_never_took_is_said(tmp_path: Path) -> None:
    (tmp_path / "refusal").write_text("log in first")
    async with at_work(package(tmp_path)) as watched:
        watched.feed.offer(figures(0))
        await watched.until(lambda: watched.feed.statistics().fault is not None)
        assert watched.feed.statistics().fault == "log in first"
    assert watched.levels() == ["warning", "warning"]
    assert "test did not receive the last steps (1): log in first" in watched.log.entries[-1]["event"]
    assert watched.feed.statistics().lost == 1


async def test_what_a_sink_that_hangs_has_not_taken_at_the_end_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed_module, "SLOW_S", 0.05)
    (tmp_path / "mood").write_text("hang")
    log = LogCapture()
    feed = SinkFeed("test", "here", package(tmp_path), log=structlog.wrap_logger(None, processors=[log]))
    async with anyio.create_task_group() as tasks:
        await tasks.start(feed.run)
        feed.offer(figures(0))
        await Watched(feed, log).until(lambda: feed.statistics().fault is not None)
        assert str(feed.statistics().fault).startswith("no answer for")
        with anyio.move_on_after(0.2) as patience:  # as the daemon does it when it ends
            await feed.close()
        assert patience.cancelled_caught
        tasks.cancel_scope.cancel()
    assert [entry["log_level"] for entry in log.entries] == ["warning"]
    assert "test did not receive the last steps (1): no answer for" in log.entries[0]["event"]
    assert feed.statistics().lost == 1


# -- metrics.jsonl ----------------------------------------------------------------------------------------------------


async def test_lines_are_whole_and_files_bounded(tmp_path: Path) -> None:
    sink = MetricsFile(tmp_path, max_bytes=2000, keep=2)
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 0, "metr')  # where the process was killed
    for step in range(60):
        await sink.write([figures(step)])
    files = sorted(os.listdir(tmp_path))
    assert files == ["metrics.1.jsonl", "metrics.2.jsonl", "metrics.jsonl"]
    assert all((tmp_path / name).stat().st_size <= 2000 for name in files)
    rows = read_steps(tmp_path, 1000)
    assert [row["step"] for row in rows] == list(range(rows[0]["step"], 60))
    assert rows[0]["step"] < 55, "the file before is read too"
    assert rows[-1] == {"step": 59, "policy_version": 7, "time": 1_700_000_059.0, "metrics": dict(figures(59).metrics)}
    assert [row["step"] for row in read_steps(tmp_path, 3)] == [57, 58, 59]
    assert read_steps(tmp_path / "away", 3) == []


async def test_a_torn_line_costs_that_line_alone(tmp_path: Path) -> None:
    sink = MetricsFile(tmp_path, max_bytes=1 << 20, keep=0)
    await sink.write([figures(0), figures(1)])
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    await sink.write([figures(2)])
    assert [row["step"] for row in read_steps(tmp_path, 10)] == [0, 2]


async def test_a_disk_that_fails_is_named_and_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "FIRST_RETRY_S", 0.01)
    async with at_work(MetricsFile(tmp_path / "away", max_bytes=1 << 20, keep=0)) as watched:
        watched.feed.offer(figures(0))
        await watched.until(lambda: watched.feed.statistics().failures > 0)
        assert "metrics.jsonl: No such file or directory" in str(watched.feed.statistics().fault)
        (tmp_path / "away").mkdir()
        await watched.until(lambda: watched.feed.statistics().written == 1)


# -- the packages -----------------------------------------------------------------------------------------------------


def needs(module: str, kind: str) -> pytest.MarkDecorator:
    is_there = importlib.util.find_spec(module) is not None
    return pytest.mark.skipif(not is_there, reason=f"{module} is not installed: pip install '.[{kind}]'")


def configured(folder: Path, **sink: Any) -> dict[str, Any]:
    """A sink's options as the daemon gives them on, from a config file."""
    (only,) = load_config(write_config(folder, metrics={"sinks": [sink]})).metrics.sinks
    return sink_options(only)


async def log_in_two_lives(folder: Path, options: dict[str, Any]) -> None:
    """Steps 0 to 2, the end of the daemon, step 2 again (a checkpoint was loaded) and 3."""
    for steps in (range(3), range(2, 4)):
        log = LogCapture()
        (feed,) = build_feeds(
            [options],
            run="test",
            state_dir=folder / "state",
            log=structlog.wrap_logger(None, processors=[log]),
            file=None,
        )
        async with anyio.create_task_group() as tasks:
            await tasks.start(feed.run)
            for step in steps:
                feed.offer(figures(step))
            with anyio.fail_after(120):
                await feed.close()
        assert feed.statistics().written == len(steps), feed.statistics()
        assert not log.entries


EXPECTED = {
    step: {**METRICS, "rollout/hard/weight": step / 100, "rollout/policy_version": 7.0} for step in range(4)
}  # fmt: skip


def event_scalars(directory: Path) -> Iterator[tuple[int, float, str, float]]:
    """Step, time, name and value of all scalars in TensorBoard's event files: records of length, check, data, check."""
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted(directory.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack_from("<Q", data)
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            for value in event.summary.value:
                yield event.step, event.wall_time, value.tag, value.simple_value


@needs("tensorboardX", "tensorboard")
async def test_tensorboard(tmp_path: Path) -> None:
    await log_in_two_lives(tmp_path, configured(tmp_path, kind="tensorboard", dir="board"))
    found: dict[int, dict[str, float]] = {}
    for step, time_s, name, value in event_scalars(tmp_path / "board" / "test"):
        assert time_s == 1_700_000_000.0 + step
        found.setdefault(step, {})[name] = pytest.approx(value)
    assert found == EXPECTED


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of an offline run: LevelDB's log format after a header of 7 bytes, a protobuf message each."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


@needs("wandb", "wandb")
async def test_wandb_offline(tmp_path: Path) -> None:
    await log_in_two_lives(tmp_path, configured(tmp_path, kind="wandb", mode="offline", project="p", tags=["a"]))
    runs = sorted((tmp_path / "state/sinks/wandb/wandb").glob("offline-run-*/run-*.wandb"))
    assert len({path.name for path in runs}) == 1, "both lives are the same run"
    found: dict[int, dict[str, float]] = {}
    for record in (record for path in runs for record in wandb_records(path)):
        if record.WhichOneof("record_type") == "history":
            items = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            found[items["rollout/step"]] = {k: v for k, v in items.items() if k[0] != "_" and k != "rollout/step"}
    assert found == EXPECTED


@needs("mlflow", "mlflow")
async def test_mlflow_in_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"file:{tmp_path}/mlruns"
    await log_in_two_lives(tmp_path, configured(tmp_path, kind="mlflow", tracking_uri=uri, experiment="x"))
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("x")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("test", "FINISHED")
    found: dict[int, dict[str, float]] = {}
    for name in EXPECTED[0]:
        for metric in client.get_metric_history(run.info.run_id, name):
            found.setdefault(metric.step, {})[name] = metric.value
    assert found == EXPECTED


@needs("trackio", "trackio")
async def test_trackio(tmp_path: Path) -> None:
    await log_in_two_lives(tmp_path, configured(tmp_path, kind="trackio", project="p", dir="tracked"))
    with sqlite3.connect(tmp_path / "tracked" / "p.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics").fetchall()
    assert {name for name, _, _ in rows} == {"test"}
    assert {step: json.loads(metrics) for _, step, metrics in rows} == EXPECTED


def test_a_package_that_is_not_installed_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sinks = [{"kind": kind} for kind in ("tensorboard", "wandb", "trackio")]
    sinks += [{"kind": "mlflow", "tracking_uri": "http://127.0.0.1:5000"}]
    config = write_config(tmp_path, metrics={"sinks": sinks})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        load_config(config)
    for position, sink in enumerate(sinks):
        assert f"metrics.sinks[{position}]: {sink['kind']} needs the package" in str(caught.value)
        assert f"(pip install 'rollout-orchestrator[{sink['kind']}]')" in str(caught.value)


# -- with a real daemon -----------------------------------------------------------------------------------------------


def test_what_the_sinks_have_is_what_the_log_and_the_status_say_also_after_a_kill(tmp_path: Path) -> None:
    broken = {"kind": "mlflow", "tracking_uri": "http://127.0.0.1:9"}  # nobody listens there
    sinks = [{"kind": "tensorboard", "dir": "board"}, *([broken] if importlib.util.find_spec("mlflow") else [])]
    config = write_config(tmp_path, metrics={"sinks": sinks})
    with daemon(config) as process:
        with process.connect() as client:
            for _ in range(3):
                client.ack(client.get_batch(timeout_s=30).lease)
            while any(s["written"] < 3 for s in client.status()["sinks"][:2]):
                pass
            process.wait_for_line("step 2: ")
            process.kill()
        process.start()
        with process.connect() as client:
            assert [point["step"] for point in client.status(history=9)["history"]] == [0, 1, 2], "as before the kill"
            for _ in range(2):
                client.ack(client.get_batch(timeout_s=30).lease)
            history = client.status(history=9)["history"]
        assert process.stop() == 0, "what is queued is written before the end"
    logged = {line["rollout"]["step"]: line["metrics"] for line in process.log if line["event"]["dataset"] == "step"}
    assert sorted(logged) == [0, 1, 2, 3, 4]
    rows = read_steps(tmp_path / "state", 100)
    assert {row["step"]: row["metrics"] for row in rows} == logged
    assert [point["sources"]["easy"][0] for point in history] == [m["rollout/easy/weight"] for m in logged.values()]
    board: dict[int, dict[str, float]] = {}
    for step, _, name, value in event_scalars(tmp_path / "board" / "test"):
        board.setdefault(step, {})[name] = value
    assert {step: {n: v for n, v in m.items() if n != "rollout/policy_version"} for step, m in board.items()} == {
        step: pytest.approx(metrics) for step, metrics in logged.items()
    }
