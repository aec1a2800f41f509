"""Lines of a real run through a real shipper, Debian's rsyslog, into a ``_bulk`` endpoint: each is there, once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.campaigns.checks import until
from tests.logs.test_lines import logged
from tests.support.bulk_sink import BulkSink
from tests.support.daemon_process import DaemonProcess, daemon, write_config
from tests.support.ecs_lines import ELK, problems, template

DEADLINE_S = 60.0


def has_rsyslog() -> bool:
    return shutil.which("rsyslogd") is not None and any(Path("/usr/lib").glob("*/rsyslog/omelasticsearch.so"))


pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.skipif(
        not has_rsyslog(), reason="needs rsyslog with omelasticsearch: apt-get install rsyslog-elasticsearch"
    ),
]


class Shipper:
    """rsyslog with the committed configuration; it may be killed and started again."""

    def __init__(self, log: Path, sink: BulkSink, work: Path) -> None:
        self._work = work
        self._environment = {
            **os.environ,
            "ROLLOUT_LOG": f"{log}*",
            "ROLLOUT_ES_HOST": "127.0.0.1",
            "ROLLOUT_ES_PORT": str(sink.port),
            "ROLLOUT_WORK": str(work),
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        pid = self._work / "pid"
        pid.unlink(missing_ok=True)
        with (self._work / "said").open("ab") as said:
            self._process = subprocess.Popen(
                ["rsyslogd", "-n", "-i", str(pid), "-f", str(ELK / "rsyslog.conf")],
                env=self._environment,
                stdout=said,
                stderr=said,
            )

    def end(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)
        self._process.wait(30)

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()


@contextmanager
def shipper(log: Path, sink: BulkSink, work: Path) -> Iterator[Shipper]:
    work.mkdir()
    ship = Shipper(log, sink, work)
    ship.start()
    try:
        yield ship
    finally:
        ship.close()


@pytest.fixture
def sink() -> Iterator[BulkSink]:
    kept = BulkSink()
    kept.start()
    yield kept
    kept.stop()


def train(process: DaemonProcess, batches: int) -> None:
    """And wait for most of the lines, which are written a moment later, in the newest file."""
    log = process.config.parent / "log.jsonl"
    with process.connect() as client:
        for _ in range(batches):
            client.ack(client.get_batch(timeout_s=30).lease)
    until(lambda: log.exists() and log.read_bytes().count(b"\n") > 4 * batches, "there are lines of every batch")


def ids(*paths: Path) -> list[str]:
    return [line["event"]["id"] for path in paths for line in logged(path)]


def test_each_line_arrives_once_through_rotation_a_killed_shipper_and_an_outage(tmp_path: Path, sink: BulkSink) -> None:
    log = tmp_path / "log.jsonl"
    first, second, third = (tmp_path / f"log.jsonl.{number}" for number in (1, 2, 3))
    with daemon(write_config(tmp_path)) as process:
        train(process, 5)
        sink.is_busy = True
        with shipper(log, sink, tmp_path / "work") as ship:
            sink.wait_for(set(ids(log)), DEADLINE_S)
            assert max(sink.sent.values()) > 1, "none was refused for lack of room, and sent again"
            sink.is_busy = False

            log.rename(first)  # rotation while it ships
            process.signal(signal.SIGUSR1)
            train(process, 5)
            sink.wait_for({ids(log)[0]}, DEADLINE_S)

            ship.end(signal.SIGKILL)  # in the middle of what it ships; the log is rotated meanwhile
            train(process, 5)
            log.rename(second)
            process.signal(signal.SIGUSR1)
            train(process, 5)
            ship.start()

            sink.stop()  # an outage, in which the log is rotated too
            train(process, 5)
            log.rename(third)
            process.signal(signal.SIGUSR1)
            train(process, 5)
            sink.start()
            assert process.stop() == 0

            written = ids(first, second, third, log)
            sink.wait_for(set(written), DEADLINE_S)
            ship.end(signal.SIGTERM)

    assert len(written) > 150
    assert len(set(written)) == len(written) == len(sink.documents)
    assert sink.indices == {"logs-rollout-default"}
    assert not sink.malformed
    assert not (tmp_path / "work" / "refused").exists()
    lines: dict[str, Any] = {line["event"]["id"]: line for path in (first, second, third, log) for line in logged(path)}
    assert sink.documents == lines
    properties = template()
    assert not {problem for document in sink.documents.values() for problem in problems(document, properties)}


def test_half_a_line_is_kept_aside_and_the_next_arrives(tmp_path: Path, sink: BulkSink) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"@timestamp":"2026-01-01T00:00:00.000000Z","log.level":"info","mess\n')  # of a killed daemon
    with daemon(write_config(tmp_path)) as process, shipper(log, sink, tmp_path / "work") as ship:
        train(process, 1)
        assert process.stop() == 0
        written = [line for line in log.read_text().splitlines() if line.endswith("}")]
        sink.wait_for({json.loads(line)["event"]["id"] for line in written}, DEADLINE_S)
        ship.end(signal.SIGTERM)
    assert len(sink.documents) == len(written)
    assert '"mess' in (tmp_path / "work" / "refused").read_text()
