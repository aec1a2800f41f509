"""Health, status and metrics over HTTP, from a real daemon."""

from __future__ import annotations

import http.client
import json
import socket
import urllib.error
import urllib.request
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from orchestrator.status.stream import MAX_STREAMS
from tests.support.browser import free_port, until
from tests.support.daemon_process import daemon, write_config

pytestmark = pytest.mark.timeout(60)


def fetch(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_metrics_and_status_agree_with_what_the_client_counts(tmp_path: Path) -> None:
    port = free_port()
    with daemon(write_config(tmp_path, status={"http": f"127.0.0.1:{port}"})) as process, process.connect() as client:
        handed_out = dict.fromkeys(("easy", "hard"), 0)
        for _ in range(5):
            batch = client.get_batch(timeout_s=30)
            for name, count in batch.counts.items():
                handed_out[name] += count
            client.ack(batch.lease)
        client.get_batch(timeout_s=30)
        assert fetch(port, "/-/healthy") == (200, "ok\n")
        assert fetch(port, "/-/ready") == (200, "ready\n")
        status = json.loads(fetch(port, "/status")[1])
        assert status["step"] == client.status()["step"] == 6
        code, text = fetch(port, "/metrics")
        assert code == 200
        samples = {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
        assert samples["rollout_step", ()] == 6
        for name in handed_out:
            key = ("rollout_source_handed_out_groups_total", (("source", name),))
            assert samples[key] == status["sources"][name]["handed_out"]
            assert samples["rollout_engine_up", (("engine", "scripted-0"),)] == 1
        assert fetch(port, "/nothing")[0] == 404


def test_not_ready_while_no_engine_is_up_and_the_cause_says_so(tmp_path: Path) -> None:
    port, nobody = free_port(), free_port()
    engines = [{"kind": "llamacpp", "url": f"http://127.0.0.1:{nobody}", "name": "gone"}]
    config = write_config(tmp_path, status={"http": f"127.0.0.1:{port}"}, engines=engines)
    with daemon(config) as process, process.connect() as client:
        status = client.status()
        while not status["engines"][0]["last_error"]:
            status = client.status()
        assert "no engine is available: gone is down" in status["cause"]["sentence"]
        code, text = fetch(port, "/-/ready")
        assert code == 503
        assert "gone is down" in text


class Stream:
    """One page's stream of events, read with a plain socket."""

    def __init__(self, port: int, last_id: str = "") -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=20)
        head = f"GET /events HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
        self._socket.sendall((head + (f"Last-Event-ID: {last_id}\r\n" if last_id else "") + "\r\n").encode())
        self._lines = self._socket.makefile("rb")
        self.code = int(self._lines.readline().split()[1])

    def event(self, name: str) -> tuple[str, dict[str, Any]]:
        """Id and data of the next event of that name."""
        identifier, found = "", False
        for line in self._lines:
            if line.startswith(b"id: "):
                identifier = line[4:].strip().decode()
            elif line.startswith(b"event: "):
                found = line[7:].strip().decode() == name
            elif found and line.startswith(b"data: "):
                return identifier, json.loads(line[6:])
        raise AssertionError("the stream ended")

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


def test_the_page_is_for_this_machine_and_what_it_missed_comes_again(tmp_path: Path) -> None:
    port = free_port()
    with daemon(write_config(tmp_path, status={"http": f"127.0.0.1:{port}"})) as process, process.connect() as client:

        def asked(path: str, host: str, method: str = "GET") -> tuple[int, dict[str, str]]:
            link = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            with closing(link):
                link.request(method, path, headers={"Host": host})
                answer = link.getresponse()
                answer.read()
                return answer.status, dict(answer.headers)

        for host, code in (("localhost", 200), (f"127.0.0.1:{port}", 200), ("[::1]:1", 200), ("evil.example", 421)):
            assert asked("/", host)[0] == asked("/metrics", host)[0] == code
        assert asked("/../../pyproject.toml", "localhost")[0] == asked("/page/index.html", "localhost")[0] == 404
        assert asked("/status", "localhost", "POST")[0] == 405
        for path in ("/", "/status", "/nothing", "/uplot/LICENSE"):
            assert "default-src 'none'" in asked(path, "localhost")[1]["Content-Security-Policy"]

        for _ in range(3):
            client.ack(client.get_batch(timeout_s=30).lease)
        streams = [Stream(port)]
        seen, data = streams[0].event("steps")
        assert data["reset"]
        assert [point["step"] for point in data["points"]] == [0, 1, 2]
        assert streams[0].event("status")[1]["step"] == 3
        client.ack(client.get_batch(timeout_s=30).lease)
        pushed = streams[0].event("steps")[1]
        assert (pushed["reset"], [point["step"] for point in pushed["points"]]) == (False, [3])
        streams += [Stream(port, seen), Stream(port, "another-process:2"), Stream(port, f"{seen}x")]
        answers = [stream.event("steps")[1] for stream in streams[1:]]
        assert [(data["reset"], len(data["points"])) for data in answers] == [(False, 1), (True, 4), (True, 4)]

        streams += [Stream(port) for _ in range(MAX_STREAMS - len(streams))]
        assert {stream.code for stream in streams} == {200}
        assert fetch(port, "/events")[0] == 503
        for stream in streams:
            stream.close()
        until(lambda: one_more(port) == 200, "closed pages make room")


def one_more(port: int) -> int:
    with closing(Stream(port)) as stream:
        return stream.code


def test_what_was_reported_as_buffered_is_there_after_a_kill(tmp_path: Path) -> None:
    port = free_port()
    config = write_config(
        tmp_path,
        status={"http": f"127.0.0.1:{port}"},
        rollout={"rollout_batch_size": 400, "lookahead": 4},
        engines=[{"kind": "scripted", "time_scale": 0.01, "max_in_flight": 16}],
    )
    with daemon(config) as process:
        for turn in range(4):
            process.connect().close()
            reported = {"easy": 0, "hard": 0}
            for source in ("easy", "hard") * 10:  # while groups come, which they do all the time
                status = json.loads(fetch(port, "/status")[1])["sources"]
                reported[source] = status[source]["groups"]["buffered"]
            process.kill()
            process.start()
            with process.connect() as client:
                kept = {name: source["groups"]["buffered"] for name, source in client.status()["sources"].items()}
            assert all(kept[name] >= reported[name] for name in reported), (turn, reported, kept)
        assert reported["easy"] > 20
