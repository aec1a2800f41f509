"""What goes to Elasticsearch: all lines of a real run fit the templates, and the dashboard asks for what is there."""

from __future__ import annotations

import json
import logging
import re
import runpy
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, get_args

import pytest
from ruamel.yaml import YAML

from orchestrator.client import RolloutClient
from orchestrator.core.ledger.events import Event
from orchestrator.errors import OrchestratorError
from orchestrator.logs import configure_logging
from orchestrator.status.step_names import SOURCE_NAMES
from tests.support.browser import free_port
from tests.support.daemon_process import DaemonProcess, daemon, write_config, write_prompts
from tests.support.ecs_lines import ELK, problems, template

pytestmark = pytest.mark.timeout(120)

DEADLINE_S = 30.0


def busy_config(folder: Path, **changes: Any) -> Path:
    """A run in which groups are dropped, capped, archived and late, one engine is away, and nothing is left unsaid."""
    sections: dict[str, Any] = {
        "engines": [
            {"kind": "scripted", "name": "one", "time_scale": 0.0, "echo_rate": 0.5},
            {"kind": "scripted", "name": "two", "time_scale": 0.0, "echo_rate": 0.5},
            {"kind": "llamacpp", "name": "away", "url": f"http://127.0.0.1:{free_port()}"},
        ],
        "rollout": {"rollout_batch_size": 4, "n_samples_per_prompt": 2, "starvation": {"patience_s": 0.1}},
        "data_source_reward_caps": [0.9, None],
        "dynamic_sampling_filter": "check_reward_nonzero_std",
        "archive": {"path": "archive"},
        "logging": {"file": "log.jsonl", "level": "debug"},
    }
    return write_config(folder, **(sections | changes))


def until(process: DaemonProcess, what: Callable[[dict[str, Any]], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not any(what(line) for line in process.log):
        assert time.monotonic() < deadline, "no such line"
        time.sleep(0.02)


def train(client: RolloutClient, batches: int = 1) -> None:
    for _ in range(batches):
        client.ack(client.get_batch(timeout_s=DEADLINE_S).lease)


def do_everything(process: DaemonProcess, folder: Path) -> None:
    """All that changes the state of a run, by way of the protocol and of signals."""
    with process.connect() as client:
        client.get_batch(timeout_s=DEADLINE_S)  # goes with its connection, and is shared out anew by the next
    with process.connect(rank=0, world_size=2) as first, process.connect(rank=1, world_size=2) as second:
        train(first)
        train(second)
    with process.connect() as client:
        train(client)
        client.nack(client.get_batch(timeout_s=DEADLINE_S).lease, discard=True)
        client.set_policy_version(1)
        client.set_weight("easy", "lambda step: 0.5")
        client.save("kept")
        client.pause_generation(timeout_s=DEADLINE_S)
        client.continue_generation()
        client.add_engine({"kind": "scripted", "name": "three", "time_scale": 0.0})
        client.drain_engine("three")
        client.remove_engine("three")
        client.add_source({"name": "more", "prompts": {"path": str(write_prompts(folder / "more.jsonl", 9))}}, 0.1)
        client.remove_source("more")
        for source in ("easy", "hard"):
            client.pause(source)
        late = client.request_batch(timeout_s=DEADLINE_S)
        until(process, lambda line: line["event"].get("action") == "batch_late")
        for source in ("easy", "hard"):
            client.resume(source)
        client.ack(client.receive_batch(late).lease)
        client.load("kept")
        client.set_policy_version(2)
        train(client)
        with pytest.raises(OrchestratorError):
            client.set_weight("neither", 1)
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(str(process.socket))
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        stranger.settimeout(DEADLINE_S)
        while stranger.recv(4096):
            pass


def reload(process: DaemonProcess, config: Path) -> None:
    """Once with a change, once with an error."""
    text = config.read_text()
    for changed, action in ((text.replace("0.7", "0.6"), "reloaded"), ("data_sources: 1", "reload_refused")):
        config.write_text(changed)
        process.signal(signal.SIGHUP)
        until(process, lambda line, action=action: line["event"].get("action") == action)  # type: ignore[misc]
    config.write_text(text)


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """All lines of a run that was killed once, and of what is said when a disk, an engine or a library fails."""
    folder = tmp_path_factory.mktemp("run")
    config = busy_config(folder)
    with daemon(config) as process:
        do_everything(process, folder)
        reload(process, config)
        process.kill()
        process.start()
        with process.connect() as client:
            train(client)
            client.drain()
        assert process.stop() == 0
        logged = process.log
    with closing(configure_logging(file=folder / "failures", level="info", run="test")) as logs:
        try:
            raise OSError(5, "the disk failed")
        except OSError:
            logs.logger("state").exception("a snapshot failed")
        logging.getLogger("aiohttp.server").warning("a library's own words")
    failures = [json.loads(line) for line in (folder / "failures").read_text().splitlines()]
    assert [line["event"]["dataset"] for line in failures] == ["state", "library"]
    return logged + failures


def test_every_kind_of_line_fits_the_templates(lines: list[dict[str, Any]]) -> None:
    properties = template()
    wrong = {f"{line['event']['dataset']}: {problem}" for line in lines for problem in problems(line, properties)}
    assert not wrong
    assert Counter(line["event"]["id"] for line in lines).most_common(1)[0][1] == 1
    assert {line["ecs"]["version"] for line in lines} == {"8.11.0"}
    assert {line["labels"]["run"] for line in lines} == {"test"}
    datasets = {line["event"]["dataset"] for line in lines}
    assert datasets >= {
        "archive", "checkpoints", "consumer", "control", "daemon", "engines", "journal", "mixer", "producer", "reload",
        "step", "step.drop", "step.lease", "step.source",
    } - {"archive", "producer"}  # fmt: skip


def test_every_change_of_state_has_a_line(lines: list[dict[str, Any]]) -> None:
    recorded = {line["event"]["action"] for line in lines if line["event"]["dataset"] == "journal"}
    assert recorded == {kind.__struct_config__.tag for kind in get_args(Event)}
    said = {line["event"].get("action") for line in lines if line["event"]["dataset"] != "journal"}
    assert said >= {
        "ready", "stopped", "draining", "reloaded", "reload_refused", "engine_up", "engine_down", "batch_late",
        "handed_out", "left", "checkpoint_saved", "checkpoint_loaded", "generation_paused", "generation_continued",
    }  # fmt: skip


def test_drops_by_reason_add_up_to_those_of_the_sources(lines: list[dict[str, Any]]) -> None:
    by_line: Counter[tuple[str, str]] = Counter()
    by_source: Counter[tuple[str, str]] = Counter()
    for line in lines:
        if line["event"]["dataset"] == "step.drop":
            by_line[line["source"]["name"], line["drop"]["reason"]] += line["drop"]["groups"]
        elif line["event"]["dataset"] == "step.source":
            by_source.update({(line["source"]["name"], r): n for r, n in line["rollout"]["dropped"].items() if n})
    assert by_line == by_source
    assert {reason for _, reason in by_line} >= {"zero_std", "discarded"}


def test_on_standard_output_lines_are_the_same_and_sigusr1_changes_nothing(tmp_path: Path) -> None:
    """As in a container: nothing else is written there, neither to standard error."""
    with daemon(write_config(tmp_path, logging={"file": None})) as process:
        with process.connect() as client:
            train(client)
            process.signal(signal.SIGUSR1)
            train(client)
        assert process.stop() == 0
        said = [json.loads(line) for line in process.stderr.splitlines()]
    assert {line["rollout"]["step"] for line in said if line["event"]["dataset"] == "step"} == {0, 1}
    properties = template()
    assert not {problem for line in said for problem in problems(line, properties)}


def test_what_is_generated_is_current() -> None:
    files = runpy.run_path(str(ELK / "generate.py"))["files"]()
    assert {name: (ELK / name).read_text() for name in files} == files, "python deploy/elk/generate.py"


def test_every_number_is_a_gauge_and_the_source_a_dimension() -> None:
    def leaves(properties: dict[str, Any], place: str = "") -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for name, field in properties.items():
            inner = field.get("properties")
            found |= {place + name: field} if inner is None else leaves(inner, f"{place}{name}.")
        return found

    fields = leaves(template())
    numbers = {name for name, field in fields.items() if field["type"] in ("long", "double")} - {"process.pid"}
    assert {name for name, field in fields.items() if field.get("time_series_metric") == "gauge"} == numbers
    named = {f"rollout.{name.replace('/', '.')}" for name in SOURCE_NAMES if "{" not in name}
    assert named <= numbers
    assert fields["source.name"]["time_series_dimension"]
    assert {name for name, field in fields.items() if field["type"] == "flattened"} >= {"metrics", "rollout.dropped"}
    index = json.loads((ELK / "index-template.json").read_text())
    assert index["data_stream"] == {}
    readme = (ELK / "README.md").read_text()
    assert all(f"_component_template/{name}" in readme for name in index["composed_of"])


def test_the_dashboard_asks_for_what_there_is(lines: list[dict[str, Any]]) -> None:
    objects = {item["type"]: item for item in map(json.loads, (ELK / "kibana.ndjson").read_text().splitlines())}
    known = {(item["type"], item["id"]) for item in objects.values()}
    assert {(r["type"], r["id"]) for item in objects.values() for r in item["references"]} <= known
    panels = json.loads(objects["dashboard"]["attributes"]["panelsJSON"])
    referred = {reference["name"] for reference in objects["dashboard"]["references"]}
    charts = [panel for panel in panels if panel["type"] == "lens"]
    assert len(charts) >= 10
    for panel in charts:
        state = panel["embeddableConfig"]["attributes"]["state"]
        assert f"{panel['panelIndex']}:indexpattern-datasource-layer-data" in referred
        matching = [line for line in lines if matches(state["query"]["query"], line)]
        assert matching, f"{panel['title']}: no line of a whole run is asked for"
        for column in state["datasourceStates"]["formBased"]["layers"]["data"]["columns"].values():
            path = column["sourceField"]
            if path != "___records___":
                assert all(value_at(line, path) is not None for line in matching), path
                assert field_at(path)["type"] in {"date": {"date"}, "string": {"keyword"}}.get(
                    column["dataType"], {"double", "long"}
                )
    places = [panel["gridData"] for panel in panels]
    cells = Counter(
        (x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])
    )
    assert cells.most_common(1)[0][1] == 1, "panels lie over each other"
    assert max(x for x, _ in cells) < 48


def matches(query: str, line: dict[str, Any]) -> bool:
    """Of KQL what the dashboard's charts use: ``field: "value"`` and ``field > number``, joined by ``and``."""
    for condition in query.split(" and "):
        path, relation, wanted = re.fullmatch(r'([\w.]+)(: | > )"?([\w.]+)"?', condition).groups()  # type: ignore[union-attr]
        value = value_at(line, path)
        if not (value == wanted if relation == ": " else value is not None and value > float(wanted)):
            return False
    return True


def value_at(line: dict[str, Any], path: str) -> Any:
    value: Any = line
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def field_at(path: str) -> dict[str, Any]:
    field: dict[str, Any] = {"properties": template()}
    for key in path.split("."):
        field = field["properties"][key]
    return field


def test_filebeat_ships_every_line_once_and_leaves_dots_alone() -> None:
    config = YAML(typ="safe", pure=True).load((ELK / "filebeat.yml").read_text())
    for shipped in config["filebeat.inputs"]:
        ndjson = shipped["parsers"][-1]["ndjson"]
        assert ndjson == {"target": "", "add_error_key": True, "overwrite_keys": True}
    (copy,) = [step["copy_fields"] for step in config["processors"]]
    assert copy["fields"] == [{"from": "event.id", "to": "@metadata._id"}]
    pattern = json.loads((ELK / "index-template.json").read_text())["index_patterns"]
    assert any(config["output.elasticsearch"]["index"].startswith(p.rstrip("*")) for p in pattern)
