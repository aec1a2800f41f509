"""Log lines as an operator's shipper meets them: real files, real pipes, a real terminal."""

from __future__ import annotations

import json
import logging
import math
import os
import pty
import re
import select
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import EngineRejected, OrchestratorError, StateError
from orchestrator.logs import LogHandle, configure_logging
from orchestrator.logs import writer as writer_module
from orchestrator.logs.lines import MAX_LINE_BYTES, EcsLines
from orchestrator.logs.writer import LogWriter, Sink


def refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def parse(line: str | bytes) -> dict[str, Any]:
    """Strict: bare NaN and repeated keys are refused."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len(dict(pairs)) == len(pairs), "a key comes twice"
        return dict(pairs)

    return json.loads(line, parse_constant=refuse, object_pairs_hook=unique)


def logged(path: Path) -> list[dict[str, Any]]:
    return [parse(line) for line in path.read_bytes().splitlines()]


def line_of(**fields: Any) -> dict[str, Any]:
    text = EcsLines("orchestrator")(None, "info", {"event": "said", "dataset": "test", **fields})
    assert text.endswith(b"\n")
    assert text.count(b"\n") == 1
    return parse(text)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "orchestrator.jsonl"


@pytest.fixture
def logs(path: Path) -> Iterator[LogHandle]:
    with closing(configure_logging(file=path, level="info")) as handle:
        yield handle


# -- what a line is ----------------------------------------------------------------------------------------------------


def test_a_line_is_ecs_with_its_head_first(logs: LogHandle, path: Path) -> None:
    begin = datetime.now(UTC)
    logs.logger("producer", source="math").warning("slow", groups=3, **{"event.duration": 5})
    logs.close()
    (line,) = logged(path)
    assert list(line)[:3] == ["@timestamp", "log.level", "message"]
    assert begin <= datetime.fromisoformat(line["@timestamp"]) <= datetime.now(UTC)
    assert line["@timestamp"].endswith("Z")
    assert (line["log.level"], line["message"]) == ("warning", "slow")
    assert line["ecs"]["version"].startswith("8.")
    assert line["service"] == {"name": "rollout-orchestrator"}
    assert line["source"] == {"name": "math"}
    assert line["event"] == {"dataset": "producer", "duration": 5, "id": line["event"]["id"]}
    assert line["groups"] == 3


def test_lines_below_the_level_are_not_made(path: Path) -> None:
    with closing(configure_logging(file=path, level="warning")) as logs:
        logs.logger("a").info("no")
        logs.logger("a").error("yes")
    assert [line["message"] for line in logged(path)] == ["yes"]


def test_event_ids_are_unique_over_handles(tmp_path: Path) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        with closing(configure_logging(file=path, level="info")) as logs:
            for _ in range(100):
                logs.logger("a").info("x")
    assert len({line["event"]["id"] for path in paths for line in logged(path)}) == 200


def test_an_unknown_level_is_refused_before_anything_is_opened(path: Path) -> None:
    with pytest.raises(ValueError, match="'loud'; use one of debug, info"):
        configure_logging(file=path, level="loud")
    assert not path.exists()


def test_a_file_that_cannot_be_opened_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StateError, match=r"cannot open the log file .*file/x\.jsonl: .*logging\.file"):
        configure_logging(file=tmp_path / "file" / "x.jsonl", level="info")


class Unprintable:
    def __str__(self) -> str:
        raise RuntimeError("no")

    __repr__ = __str__


CIRCLE: list[Any] = []
CIRCLE.append(CIRCLE)


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (math.nan, None),
        ({"mean": math.inf}, {"mean": None}),
        (Path("/a/b"), "/a/b"),
        (b"\xff", r"b'\xff'"),
        ("\ud800", r"\ud800"),
        ({"\udfff": 1, 2: "two"}, {r"\udfff": 1, "2": "two"}),
        (1 << 70, str(1 << 70)),
        (Unprintable(), "<Unprintable without text: RuntimeError>"),
        ([{"deep": Unprintable()}], [{"deep": "<Unprintable without text: RuntimeError>"}]),
    ],
)
def test_what_json_cannot_say_becomes_text(value: object, written: object) -> None:
    assert line_of(value=value)["value"] == written


def test_a_circle_does_not_end_the_line() -> None:
    assert line_of(value=CIRCLE, kept=1)["kept"] == 1


def test_a_line_that_is_too_long_keeps_its_head() -> None:
    text = EcsLines("orchestrator")(
        None, "error", {"event": "m" * 10_000, "dataset": "test", "prompt": "x" * MAX_LINE_BYTES}
    )
    assert len(text) < MAX_LINE_BYTES
    line = parse(text)
    assert line["message"].startswith("mmm")
    assert "cut: this line had" in line["message"]
    assert line["event"]["dataset"] == "test"


def test_fields_never_take_the_place_of_the_head_nor_mix_leaves_and_objects() -> None:
    line = line_of(
        **{
            "log.level": "x",
            "message": "y",
            "@timestamp": 0,
            "a": 1,
            "a.b": 2,
            "c.d": 3,
            "c": 4,
            "source": {"ip": "::1"},
        },
        error="broke",
    )
    assert (line["log.level"], line["message"]) == ("info", "said")
    assert line["labels"] == {"log_level": "x", "message": "y", "@timestamp": 0}
    assert line["a"] == {"value": 1, "b": 2}
    assert line["c"] == {"d": 3, "value": 4}
    assert line["source"] == {"ip": "::1"}
    assert line["error"] == {"message": "broke"}


KEYS = st.sampled_from(["a", "a.b", "a.b.c", "labels", "log.level", "error", "event.id", "source", "ecs", ".", "a..b"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()) | st.binary() | st.just(CIRCLE),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(st.tuples(KEYS, VALUES), max_size=6))
def test_whatever_is_logged_the_line_is_json_with_its_head(fields: list[tuple[str, Any]]) -> None:
    line = line_of(**dict(fields))
    assert list(line)[:3] == ["@timestamp", "log.level", "message"]
    assert line["message"] == "said"


def test_an_exception_is_written_as_ecs(logs: LogHandle, path: Path) -> None:
    try:
        raise EngineRejected("a:1", "context overflow") from ValueError("inner")
    except OrchestratorError:
        logs.logger("engines").exception("gave up")
    logs.close()
    (line,) = logged(path)
    assert line["log.level"] == "error"
    assert line["error"]["type"] == "orchestrator.errors.EngineRejected"
    assert line["error"]["message"] == "engine a:1: context overflow"
    assert "ValueError: inner" in line["error"]["stack_trace"]


@dataclass
class Figures:
    step: int = 7
    policy_version: int = 2
    trainer_wait_s: float = 1.5
    sources: dict[str, dict[str, Any]] = field(
        default_factory=lambda: {
            "v1.5": {"weight": 0.25, "group_count": 8, "response_len": {"mean": math.nan}},
            "hard": {"weight": 0.75, "group_count": 24, "response_len": {"mean": 12.5}, "dropped": {"a": 0, "b.c": 3}},
        }
    )

    @property
    def slashed(self) -> dict[str, float]:
        return {"rollout/v1.5/weight": 0.25, "rollout/hard/weight": 0.75}


def test_lines_of_steps_are_of_level_info(path: Path) -> None:
    with closing(configure_logging(file=path, level="warning")) as logs:
        logs.step(Figures())
    assert logged(path) == []


def test_a_step_is_one_line_a_source_one_a_reason_and_one_with_slashed_names(logs: LogHandle, path: Path) -> None:
    logs.step(Figures())
    logs.close()
    first, second, drop, whole = logged(path)
    assert [line["source"]["name"] for line in (first, second, drop)] == ["v1.5", "hard", "hard"]
    assert (drop["event"]["dataset"], drop["drop"]) == ("step.drop", {"reason": "b.c", "groups": 3})
    assert first["rollout"] == {
        "step": 7, "policy_version": 2, "weight": 0.25, "group_count": 8, "response_len": {"mean": None},
    }  # fmt: skip
    assert whole["metrics"] == {"rollout/v1.5/weight": 0.25, "rollout/hard/weight": 0.75}
    assert whole["rollout"] == {"step": 7, "policy_version": 2, "trainer_wait_s": 1.5}
    assert whole["message"] == "step 7: v1.5 8 groups (weight 0.25), hard 24 groups (weight 0.75)"
    assert first["event"]["dataset"] != whole["event"]["dataset"]


# -- libraries ---------------------------------------------------------------------------------------------------------


def test_what_libraries_say_is_lines_and_no_stray_text() -> None:
    program = """
import asyncio, gc, logging
from orchestrator.logs import configure_logging

async def lose_a_task():
    asyncio.get_running_loop().create_future().set_exception(KeyError("k"))
    gc.collect()

logs = configure_logging(file=None, level="info")
asyncio.run(lose_a_task())
logging.getLogger("aiohttp.server").log(35, "%d of %s", "wrong arguments")
logging.getLogger("quiet").info("not passed on")
logs.close()
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, timeout=30, capture_output=True)
    lost, wrong = [parse(line) for line in done.stdout.splitlines()]
    assert done.stderr == b""
    assert lost["message"].startswith("Future exception was never retrieved")
    assert (lost["log.level"], lost["log"]) == ("error", {"logger": "asyncio"})
    assert (lost["error"]["type"], lost["event"]["dataset"]) == ("KeyError", "library")
    assert (wrong["log.level"], wrong["message"]) == ("warning", "%d of %s ('wrong arguments',)")


def test_close_takes_the_handler_away(path: Path) -> None:
    before = list(logging.getLogger().handlers)
    logs = configure_logging(file=path, level="info")
    assert len(logging.getLogger().handlers) == len(before) + 1
    logs.close()
    logs.close()
    logs.reopen()
    logs.logger("late").info("after the end")
    assert logging.getLogger().handlers == before
    assert logged(path) == []


# -- files -------------------------------------------------------------------------------------------------------------


def test_rotation_by_rename_loses_nothing(logs: LogHandle, path: Path) -> None:
    log = logs.logger("a")
    rotated = path.with_suffix(".1")
    for number in range(100):
        log.info(f"{number}")
        if number == 49:
            path.rename(rotated)
            logs.reopen()
    logs.close()
    assert [int(line["message"]) for line in logged(rotated)] == list(range(50))
    assert [int(line["message"]) for line in logged(path)] == list(range(50, 100))


def test_a_rotation_that_fails_goes_on_in_the_old_file_and_says_so(logs: LogHandle, path: Path) -> None:
    logs.logger("a").info("before")
    rotated = path.with_suffix(".1")
    path.rename(rotated)
    path.mkdir()
    logs.reopen()
    logs.logger("a").info("after")
    logs.close()
    first, fault, last = logged(rotated)
    assert (first["message"], last["message"]) == ("before", "after")
    assert "cannot reopen the log file" in fault["message"]


def test_half_a_line_of_a_killed_process_is_ended_first(path: Path) -> None:
    path.parent.mkdir()
    path.write_text('{"message":"whole"}\n{"message":"ha')
    with closing(configure_logging(file=path, level="info")) as logs:
        logs.logger("a").info("next")
    whole, half, following = path.read_text().splitlines()
    assert (parse(whole)["message"], half) == ("whole", '{"message":"ha')
    assert parse(following)["message"] == "next"


def test_a_full_disk_costs_whole_lines_and_their_number_is_told(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the end of the disk, lifted in the middle, in a process of its own."""
    program = """
import resource, signal, sys
from pathlib import Path
from orchestrator.logs import configure_logging
path, rotated = Path(sys.argv[1]), Path(sys.argv[1] + ".1")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
logs = configure_logging(file=path, level="info")
resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, resource.RLIM_INFINITY))
for number in range(100):
    logs.logger("a").info(f"{number}")
path.rename(rotated)
logs.reopen()
while not path.exists():  # once it does, everything before is written or lost
    pass
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
logs.logger("a").info("100")
logs.close()
"""
    path = tmp_path / "log"
    subprocess.run([sys.executable, "-c", program, path], check=True, timeout=30)
    numbers: list[int] = []
    lost = torn = 0
    for text in path.with_suffix(".1").read_bytes().splitlines() + path.read_bytes().splitlines():
        try:
            line = parse(text)
        except ValueError:
            torn += 1
            continue
        if "logging" in line:
            lost += line["logging"]["lost_lines"]
            assert "File too large" in line["message"]
        else:
            numbers.append(int(line["message"]))
    assert torn <= 1
    assert numbers[-1] == 100
    assert numbers == sorted(set(numbers))
    assert lost > 0
    assert lost + len(numbers) == 101


# -- streams -----------------------------------------------------------------------------------------------------------


def test_a_reader_that_stops_costs_lines_and_not_the_loop() -> None:
    """Nothing here waits for the pipe: were ``offer`` to, the test would hang until its deadline."""
    read, write = os.pipe()
    with open(write, "w") as stream:
        sink = Sink(None, stream)
    writer = LogWriter(sink, lambda lost, why: f"lost {lost}: {why}\n".encode(), queue_bytes=100_000)
    line = b"x" * 999 + b"\n"
    for _ in range(2_000):  # 2 MB into a pipe of 64 KiB and a queue of 100 kB
        writer.offer(line)
    with open(read, "rb") as pipe:
        closer = threading.Thread(target=writer.close, args=(30,))
        closer.start()
        lines = pipe.read().splitlines()
        closer.join()
    (loss,) = [text for text in lines if text.startswith(b"lost")]
    assert b"the queue was full" in loss
    kept = [text for text in lines if text == b"x" * 999]
    assert len(kept) + 1 == len(lines)
    assert int(loss.split()[1].rstrip(b":")) + len(kept) == 2_000


def test_what_can_wait_is_written_with_what_cannot_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines of steps wait for each other, as long as this test has time; another line takes all along."""
    monkeypatch.setattr(writer_module, "GATHER_S", 60.0)
    reader, end = os.pipe()
    with os.fdopen(end, "w") as stream:
        writer = LogWriter(Sink(None, stream), lambda lost, why: b"lost\n")
    writer.offer_later(b"first\n")  # the thread had nothing to do
    assert os.read(reader, 1000) == b"first\n"
    while not writer._is_resting:
        pass
    writer.offer_later(b"a\n", b"b\n")
    writer.offer_later(b"c\n")
    assert select.select([reader], [], [], 0)[0] == []
    writer.offer(b"error\n")
    assert os.read(reader, 1000) == b"a\nb\nc\nerror\n"
    writer.offer_later(b"last\n")
    writer.close()
    assert os.read(reader, 1000) == b"last\n"
    os.close(reader)


def test_close_gives_up_on_a_reader_that_has_stopped() -> None:
    read, write = os.pipe()
    with open(read, "rb"), open(write, "w") as stream:
        logs = configure_logging(file=None, level="info", stream=stream)
        for _ in range(200):
            logs.logger("a").info("x" * 1_000)
        logs.close(deadline_s=0.01)


def test_a_pipe_that_is_non_blocking_loses_nothing() -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)
    with open(write, "w") as stream:
        logs = configure_logging(file=None, level="info", stream=stream)
    for number in range(500):
        logs.logger("a").info(f"{number}", filler="x" * 1_000)
    with open(read, "rb") as pipe:
        closer = threading.Thread(target=logs.close, args=(30,))
        closer.start()
        lines = [parse(line) for line in pipe]
        closer.join()
    assert [int(line["message"]) for line in lines] == list(range(500))


def test_a_reader_that_has_gone_is_no_error() -> None:
    read, write = os.pipe()
    with open(write, "w") as stream:
        logs = configure_logging(file=None, level="info", stream=stream)
    os.close(read)
    logs.logger("a").info("to nobody")
    logs.close()


def on_a_terminal(use: Callable[[Any], None]) -> str:
    master, slave = pty.openpty()
    with open(slave, "w") as stream:
        use(stream)
    shown = b""
    with open(master, "rb", buffering=0) as screen:
        try:
            while piece := screen.read(4096):
                shown += piece
        except OSError:  # the end of a terminal's output
            pass
    return shown.decode()


def test_on_a_terminal_lines_are_text_without_control_characters() -> None:
    def use(stream: Any) -> None:
        with closing(configure_logging(file=None, level="info", stream=stream)) as logs:
            logs.logger("daemon").warning("engine said \x1b[2J", odd=Unprintable())
            logs.logger("daemon").warning("count", groups=3, sent="\x1b[3J")
            try:
                raise ValueError("\x1b[4J")
            except ValueError:
                logs.logger("daemon").exception("failed")
            logs.step(Figures())

    shown = on_a_terminal(use)
    assert "engine said \\x1b[2J" in shown
    assert not re.search(r"\x1b\[\dJ", shown)
    assert "ValueError: \\x1b[4J" in shown
    assert "@timestamp" not in shown
    assert "groups" in shown
    assert shown.count("step 7") == 1


def test_on_a_terminal_json_may_be_asked_for() -> None:
    def use(stream: Any) -> None:
        with closing(configure_logging(file=None, level="info", stream=stream, json=True)) as logs:
            logs.logger("daemon").info("x")

    assert parse(on_a_terminal(use))["message"] == "x"


def test_a_process_without_standard_output_logs_to_nowhere(tmp_path: Path) -> None:
    """Descriptor 1 belongs to somebody else then: to write there would damage a file of the daemon."""
    program = """
import sys
from orchestrator.logs import configure_logging
with open(sys.argv[1], "w") as victim:
    assert victim.fileno() == 1
    logs = configure_logging(file=None, level="info")
    logs.logger("a").info("x")
    logs.close()
"""
    subprocess.run(
        ["/bin/sh", "-c", 'exec "$0" -c "$1" "$2" >&-', sys.executable, program, str(tmp_path / "victim")],
        check=True,
        timeout=30,
    )
    assert (tmp_path / "victim").read_bytes() == b""
