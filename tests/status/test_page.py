"""The page in a real Chromium: it shows what the status, the log, Prometheus and the trainer say of the same run."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from orchestrator.client import RolloutClient
from orchestrator.errors import BatchTimeout
from tests.status.test_http import fetch
from tests.support.browser import Browser, Tab, free_port, until
from tests.support.daemon_process import DaemonProcess, daemon, write_config

pytestmark = pytest.mark.timeout(90)

SOURCES = ("easy", "hard")
STEPS = 12
MOVING = {"held_s", "first_token_s", "written_bytes", "backlog_bytes"}
"""Figures that change while nothing happens: clocks, and what the log writes of itself."""

SHOWN = """() => [...document.querySelectorAll('[data-path]')].map(
    (element) => [JSON.parse(element.dataset.path), JSON.parse(element.dataset.value), element.textContent])"""
CURVES = """() => Object.fromEntries([...document.querySelectorAll('figure')].map((figure) => {
    const plot = figure.querySelector('div').plot;
    const curves = plot.series.map((series, i) => [i ? series.label : 'step', [...plot.data[i]]]);
    return [figure.id, Object.fromEntries(curves)];
}))"""
SHOWN_CURVES = "document.querySelector('#chart-share > div').plot.series.map((series) => series.show).join()"
IS_LIVE = "document.getElementById('link').className === 'live'"


class Run:
    """A daemon, a trainer, and somebody who has the page open."""

    def __init__(self, process: DaemonProcess, port: int, tab: Tab) -> None:
        self.process = process
        self.port = port
        self.tab = tab
        self.trainer: RolloutClient = process.connect()

    def status(self) -> dict[str, Any]:
        """As ``orchestrator status --json`` prints it."""
        command = [sys.executable, "-m", "orchestrator", "status", "--json", "--socket", str(self.process.socket)]
        return dict(json.loads(subprocess.run(command, capture_output=True, check=True, timeout=30).stdout))

    def seen(self, after: float) -> dict[str, tuple[list[Any], Any, str]]:
        """What the page shows of a status that is newer than that, by the path in it."""
        self.tab.wait_for("(time) => Number(document.body.dataset.time) > time", after)
        return {json.dumps(path): (path, value, text) for path, value, text in self.tab.evaluate(SHOWN)}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, browser: Browser) -> Iterator[Run]:
    port = free_port()
    config = write_config(
        tmp_path_factory.mktemp("page"),
        run={"name": "page-test"},
        status={"http": f"127.0.0.1:{port}"},
        rollout={"rollout_batch_size": 6, "n_samples_per_prompt": 3},
        sampling={"max_new_tokens": 40},
        engines=[{"kind": "scripted", "time_scale": 0.0, "echo_rate": 0.5, "length": [2, 40], "seed": 4}],
        data_source_weights=["lambda step: 0.9 - 0.03 * step", "lambda step: 0.1 + 0.03 * step"],
        dynamic_sampling_filter="check_reward_nonzero_std",
    )
    with daemon(config) as process:
        process.connect().close()
        with browser.tab(f"http://127.0.0.1:{port}/") as tab:
            found = Run(process, port, tab)
            try:
                yield found
            finally:
                found.trainer.close()


def counted(batch: Any) -> dict[str, dict[str, float | None]]:
    """A trainer's own count of what it was handed, by source."""
    figures: dict[str, dict[str, float | None]] = {}
    for name in SOURCES:
        groups = [group for group in batch.groups if group.source == name]
        rewards = [float(sample.reward) for group in groups for sample in group.samples]
        lengths = [len(sample.response_tokens) for group in groups for sample in group.samples]
        oldest = [min(v for s in group.samples for v, _ in s.versions if v >= 0) for group in groups]
        ages = [batch.policy_version - version for version in oldest]
        figures[name] = {
            "weight": batch.weights[name],
            "groups": len(groups),
            "samples": len(rewards),
            "reward/mean": statistics.fmean(rewards) if rewards else None,
            "reward/std": statistics.pstdev(rewards) if rewards else None,
            "reward/min": min(rewards, default=None),
            "reward/max": max(rewards, default=None),
            "response_tokens/mean": statistics.fmean(lengths) if lengths else None,
            "response_tokens/min": min(lengths, default=None),
            "response_tokens/max": max(lengths, default=None),
            "staleness_versions/mean": statistics.fmean(ages) if ages else None,
            "staleness_versions/max": max(ages, default=None),
        }
    return figures


def scraped(port: int) -> tuple[int, dict[str, dict[str, float]]]:
    """The newest batch as Prometheus has it: its step, and the same figures by source."""
    figures: dict[str, dict[str, float]] = {name: {} for name in SOURCES}
    step = -1
    for family in text_string_to_metric_families(fetch(port, "/metrics")[1]):
        for sample in family.samples:
            if sample.name == "rollout_batch_step":
                step = int(sample.value)
            elif sample.name.startswith("rollout_batch_") and "source" in sample.labels:
                name = "/".join(
                    [sample.name.removeprefix("rollout_batch_"), *filter(None, [sample.labels.get("statistic")])]
                )
                figures[sample.labels["source"]][name] = sample.value
    return step, figures


LOG_NAMES = {
    "groups": "group_count",
    "samples": "sample_count",
    "reward": "raw_reward",
    "response_tokens": "response_len",
}
LOG_NAMES["staleness_versions"] = "staleness"
CURVE_OF = {
    "weight": ("chart-share", "share/asked"),
    "reward/mean": ("chart-reward", "raw_reward/mean"),
    "response_tokens/mean": ("chart-length", "response_len/mean"),
    "response_tokens/max": ("chart-length", "response_len/max"),
    "staleness_versions/mean": ("chart-staleness", "staleness/mean"),
    "staleness_versions/max": ("chart-staleness", "staleness/max"),
}


def test_four_witnesses_of_one_run_agree_for_every_source_and_step(run: Run) -> None:
    """The trainer counts what it is handed; Prometheus, the log and the page's curves have the same figures."""
    own, prometheus = {}, {}
    for version in range(STEPS):
        batch = run.trainer.get_batch(timeout_s=30)
        own[batch.step] = counted(batch)
        step, figures = scraped(run.port)
        assert step == batch.step
        prometheus[step] = figures
        run.trainer.ack(batch.lease)
        if version % 2:
            run.trainer.set_policy_version(version)
    assert any(figures[name]["groups"] != 3 for figures in own.values() for name in SOURCES), "a mixture that changes"
    assert any(figures[name]["staleness_versions/max"] for figures in own.values() for name in SOURCES)
    assert any((figures[name]["reward/std"] or 0) > 0 for figures in own.values() for name in SOURCES)

    until(lambda: steps_in_log(run.process).keys() >= own.keys(), "the log has the lines of every step")
    lines = steps_in_log(run.process)
    run.tab.wait_for("(step) => document.querySelector('#chart-share > div').plot?.data[0].includes(step)", max(own))
    curves = run.tab.evaluate(CURVES)
    for step, by_source in own.items():
        at = curves["chart-share"]["step"].index(step)
        handed_out = sum(figures["groups"] or 0 for figures in by_source.values())
        for name, figures in by_source.items():
            for figure, value in figures.items():
                where = f"{figure} of {name} at step {step}"
                head, _, statistic = figure.partition("/")
                logged = lines[step][f"rollout/{name}/{'/'.join(filter(None, [LOG_NAMES.get(head, head), statistic]))}"]
                if value is None:
                    assert figure not in prometheus[step][name], where
                    assert logged == 0, where
                else:
                    assert prometheus[step][name][figure] == pytest.approx(value, abs=1e-9), where
                    assert logged == pytest.approx(value, abs=1e-9), where
                if figure in CURVE_OF:
                    chart, curve = CURVE_OF[figure]
                    drawn = curves[chart][f"{name} {curve}"][at]
                    assert drawn == (None if value is None else pytest.approx(value, abs=1e-9)), where
            share = curves["chart-share"][f"{name} share/handed"][at]
            assert share == pytest.approx((figures["groups"] or 0) / handed_out)
            upper = curves["chart-reward"][f"{name} reward/upper"][at]
            if figures["reward/mean"] is not None and figures["reward/std"] is not None:
                assert upper == pytest.approx(
                    min(figures["reward/max"] or 0, figures["reward/mean"] + figures["reward/std"])
                )
            drops = sum(value for key, value in lines[step].items() if key.startswith(f"rollout/{name}/dropped/"))
            assert curves["chart-dropped"][f"{name} dropped"][at] == prometheus[step][name]["dropped_groups"] == drops


def steps_in_log(process: DaemonProcess) -> dict[int, dict[str, float]]:
    return {line["rollout"]["step"]: line["metrics"] for line in process.log if line["event"]["dataset"] == "step"}


def test_numbers_are_those_of_the_status(run: Run) -> None:
    run.trainer.ack(run.trainer.get_batch(timeout_s=30).lease)
    held = run.trainer.get_batch(timeout_s=30)
    until(lambda: not run.trainer.status()["generation"]["in_flight"], "nothing goes on")
    status = run.status()
    shown = run.seen(after=status["time"])
    checked = 0
    for path, value, text in shown.values():
        expected: Any = status
        for key in path:
            expected = expected[key]
        if path[-1] in MOVING:
            assert type(value) is type(expected), path
            continue
        assert value == expected, path
        if isinstance(value, int):
            assert text.replace(",", "") == str(value)
        elif isinstance(value, float) and text.endswith("%"):
            assert float(text.rstrip("% ")) == pytest.approx(100 * value, abs=0.05 + 1e-9)
        checked += 1
    assert checked > 30
    for path in (["step"], ["sources", "hard", "bound"], ["plan", 0, "counts", "easy"], ["engines", 0, "tokens"]):
        assert json.dumps(path, separators=(", ", ": ")) in shown
    assert run.tab.text("#headline") == run.trainer.status()["headline"]["text"] or "working on step" in run.tab.text(
        "#headline"
    )
    assert run.tab.text("#run") == "page-test"
    events = [event["message"] for event in reversed(status["events"])]
    assert run.tab.evaluate("[...document.querySelectorAll('#events span')].map((e) => e.textContent)") == events
    run.trainer.ack(held.lease)


def test_it_can_be_read_on_a_laptop_and_a_phone_in_the_light_and_in_the_dark(run: Run) -> None:
    tab = run.tab
    for name in SOURCES:
        run.trainer.pause(name)
    try:
        with pytest.raises(BatchTimeout):  # the first one only begins the wait
            run.trainer.get_batch(timeout_s=0.1)
        papers = set()
        for width, height in ((1366, 768), (390, 844)):
            for theme in ("light", "dark"):
                tab.size(width, height)
                tab.theme(theme)
                papers.add(tab.evaluate("getComputedStyle(document.body).backgroundColor"))
                # charts take their new size after the next frame
                tab.wait_for("(width) => document.documentElement.scrollWidth <= width", width)
                tab.wait_for(
                    "[...document.querySelectorAll('figure')].every((figure) =>"
                    " figure.querySelector('canvas').clientWidth <= figure.clientWidth)"
                )
        assert len(papers) == 2
    finally:  # the next test has the same daemon
        for name in SOURCES:
            run.trainer.resume(name)
    tab.size(1366, 850)
    tab.click("#legend button")
    tab.wait_for(f"{SHOWN_CURVES} === 'true,false,false,true,true'")
    tab.click("#legend button")
    tab.wait_for(f"{SHOWN_CURVES} === 'true,true,true,true,true'")


def test_it_survives_a_restart_of_the_daemon_and_asks_no_other_host(run: Run) -> None:
    run.trainer.ack(run.trainer.get_batch(timeout_s=30).lease)
    step = run.trainer.status()["step"]
    run.tab.wait_for("(step) => document.querySelector('#where b').textContent === String(step)", step)
    run.tab.wait_for("(step) => document.querySelector('#chart-share > div').plot.data[0].includes(step - 1)", step)
    before = run.tab.evaluate(CURVES)
    run.trainer.close()
    run.process.kill()
    run.tab.wait_for("document.getElementById('link').className === 'lost'")
    assert "no contact with the daemon" in run.tab.text("#link")
    assert run.tab.text("#where b") == str(step), "what was known is still there"
    run.process.start()
    run.trainer = run.process.connect()
    run.tab.wait_for(IS_LIVE)
    status = run.trainer.status()
    shown = run.seen(after=status["time"])
    assert shown['["step"]'][1] == step
    assert f"pid {status['run']['pid']}" in run.tab.text("#where")
    run.trainer.ack(run.trainer.get_batch(timeout_s=30).lease)
    run.tab.wait_for("(step) => document.querySelector('#chart-share > div').plot?.data[0].includes(step)", step)
    after = run.tab.evaluate(CURVES)
    kept = len(after["chart-share"]["step"]) - 1  # the newest one is new
    assert step - 2 <= kept <= step, "the very last figures may not have been written"
    for chart, curves in before.items():
        for curve, values in curves.items():
            assert after[chart][curve][:kept] == values[:kept], "the curves go on where they were"
    hosts = {url.partition("//")[2].partition("/")[0] for url in run.tab.asked if not url.startswith("data:")}
    assert hosts == {f"127.0.0.1:{run.port}"}
    refused = "ERR_CONNECTION_REFUSED"  # while the daemon was away
    assert [error for error in run.tab.errors if refused not in error and "ERR_INCOMPLETE" not in error] == []
