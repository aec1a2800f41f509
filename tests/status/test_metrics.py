"""What is measured: every figure has a name, a unit and a meaning on one page, and is what Prometheus accepts."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from orchestrator.status.metrics import METRICS, render_metrics
from orchestrator.status.step_names import RUN_NAMES, SOURCE_NAMES
from scripts.observing import render_page
from tests.status.test_http import fetch
from tests.support.browser import free_port
from tests.support.daemon_process import daemon, write_config
from tests.support.paths import ROOT

pytestmark = pytest.mark.timeout(60)

DEPLOY = ROOT / "deploy"
PAGE = (ROOT / "docs" / "observing.md").read_text(encoding="utf-8")
EXPOSED = {metric.exposed_name: metric for section in METRICS.values() for metric in section}
GRAFANA = {"$__rate_interval": "1m", "$instance": "h:8642", "$source": "math|code"}


def promtool(*arguments: str, text: str | None = None, folder: Path = ROOT) -> str:
    """Its output; the test is skipped where it is not installed."""
    if shutil.which("promtool") is None:
        pytest.skip("promtool is missing: apt-get install prometheus")
    done = subprocess.run(["promtool", *arguments], input=text, cwd=folder, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def expressions() -> list[str]:
    """All that the dashboard asks Prometheus for, its variables filled in."""
    dashboard = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text(encoding="utf-8"))
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked += [note["expr"] for note in dashboard["annotations"]["list"]]
    for variable, value in GRAFANA.items():
        asked = [text.replace(variable, value) for text in asked]
    return asked


def test_the_page_has_what_the_code_has() -> None:
    assert render_page(PAGE) == PAGE, "python scripts/observing.py docs/observing.md"


def test_the_page_names_every_cause() -> None:
    status = ROOT / "orchestrator" / "status"
    source, general = (status / "source_cause.py").read_text(), (status / "cause.py").read_text()
    kinds = set(re.findall(r'return "(\w+)", ', source + general) + re.findall(r'_cause\("(\w+)"', general))
    kinds |= set(re.findall(r'"(\w+)" if is_long else "(\w+)"', source)[0])
    assert len(kinds) > 12
    assert not {kind for kind in kinds - {"none"} if f"`{kind}`" not in PAGE}


def test_prometheus_takes_a_run_with_all_that_a_run_can_have(tmp_path: Path) -> None:
    """Drops, caps, a batch, an engine that is away: and each name of a step is documented."""
    port = free_port()
    config = write_config(
        tmp_path,
        status={"http": f"127.0.0.1:{port}"},
        engines=[
            {"kind": "scripted", "time_scale": 0.0, "echo_rate": 0.5},
            {"kind": "llamacpp", "url": f"http://127.0.0.1:{free_port()}", "name": "away"},
        ],
        archive={"path": "archive"},
        data_source_reward_caps=[0.9, None],
        dynamic_sampling_filter="check_reward_nonzero_std",
    )
    with daemon(config) as process, process.connect() as client:
        for _ in range(3):
            client.ack(client.get_batch(timeout_s=30).lease)
        client.get_batch(timeout_s=30)
        before, (code, text), after = client.status(), fetch(port, "/metrics"), client.status()
        process.wait_for_line("step 3: ")
        names = {name for line in process.log if line["event"]["dataset"] == "step" for name in line["metrics"]}
    assert code == 200
    promtool("check", "metrics", text=text)
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    ours = {sample.name for sample in samples if sample.name.startswith("rollout_")}
    assert ours <= EXPOSED.keys()
    assert EXPOSED.keys() - ours <= {
        "rollout_cause",  # of a batch that is there
        "rollout_source_lacks_groups",
        "rollout_engine_policy_version",  # none was set
    }
    for sample in samples:
        if sample.name.startswith("rollout_"):
            assert set(sample.labels) == set(EXPOSED[sample.name].labels)
    up = {s.labels["engine"]: s.value for s in samples if s.name == "rollout_engine_up"}
    assert up == {"scripted-0": 1, "away": 0}
    dropped = sum(s.value for s in samples if s.name == "rollout_source_dropped_groups_total")
    least, most = (sum(s["groups"]["dropped"] for s in status["sources"].values()) for status in (before, after))
    assert 0 < least <= dropped <= most
    assert any(sample.name == "process_resident_memory_bytes" for sample in samples)

    plain = {re.sub(r"^rollout/(easy|hard)/|(?<=dropped/)\w+$", "", name) for name in names}
    plain = {name + "{reason}" if name == "dropped/" else name for name in plain}
    assert plain == SOURCE_NAMES.keys() | RUN_NAMES.keys()


class LibraryLines(Collector):
    """The catalogue as the library's own objects."""

    def __init__(self, status: dict[str, Any]) -> None:
        self._status = status

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        for metric in EXPOSED.values():
            make = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
            family = make(metric.name, metric.meaning, labels=metric.labels)
            for labels, value in metric.read(self._status):
                family.add_metric(labels, value)
            yield family


def test_lines_are_those_that_the_library_writes(tmp_path: Path) -> None:
    """Also of names that have to be escaped, and of numbers that are large or none."""
    with daemon(write_config(tmp_path)) as process, process.connect() as client:
        client.ack(client.get_batch(timeout_s=30).lease)
        status = client.status(history=1)
    easy = status["sources"].pop("easy")
    status["sources"]['e"a\\s\ny €'] = easy | {"carry": -1e-7, "debt": 12_345_678.5, "buffered_bytes": 10**12}
    status["sources"]["hard"] |= {"carry": math.nan, "debt": math.inf}
    registry = CollectorRegistry()
    registry.register(LibraryLines(status))
    expected = generate_latest(registry)
    assert len(expected.splitlines()) > 2 * len(EXPOSED)
    assert render_metrics(status).startswith(expected + b"# HELP process_")


def test_rules_hold_for_series_that_were_thought_of() -> None:
    folder = DEPLOY / "prometheus"
    promtool("check", "config", "prometheus.yml", folder=folder)
    assert "SUCCESS" in promtool("test", "rules", "alerts.test.yml", folder=folder)


def test_rules_and_dashboard_ask_for_what_there_is(tmp_path: Path) -> None:
    texts = [*expressions(), *(DEPLOY / "prometheus" / "alerts.yml").read_text().splitlines()]
    asked = {name for text in texts for name in re.findall(r"\brollout_\w+", text)}
    assert len(asked) > 25
    assert asked <= EXPOSED.keys()
    rules: dict[str, Any] = {"name": "dashboard", "rules": [{"record": "x", "expr": text} for text in expressions()]}
    (tmp_path / "rules.yml").write_text(json.dumps({"groups": [rules]}))
    promtool("check", "rules", str(tmp_path / "rules.yml"))
