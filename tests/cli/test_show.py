"""What was trained on, shown: at a terminal with and without a daemon, and as a page that nothing in it can steer."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import pytest

from orchestrator.archive import find_step, read_groups
from orchestrator.cli import main
from tests.archive.test_archiver import train, wait_until_archived
from tests.status.test_http import fetch, free_port
from tests.support.browser import Browser
from tests.support.daemon_process import daemon, write_config

pytestmark = pytest.mark.timeout(120)

NASTY = "<script>document.title='taken'</script> \x1b[31m & \"quoted\""


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, browser_if_any: Browser | None) -> Path:
    """The folder of a run that has trained on three steps; what a daemon shows of them is in ``pages``."""
    folder = tmp_path_factory.mktemp("run")
    rows = [{"prompt": f"{NASTY} {i}", "label": str(i % 10)} for i in range(40)]
    (folder / "easy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    port = free_port()
    config = write_config(
        folder,
        archive={"path": "kept"},
        status={"http": f"127.0.0.1:{port}"},
        sampling={"max_new_tokens": 40},
        engines=[{"kind": "scripted", "time_scale": 0.0, "echo_rate": 0.5, "length": [2, 40], "seed": 4}],
    )
    with daemon(config) as process, process.connect() as client:
        train(client, 3)
        wait_until_archived(client)
        pages = {
            path: fetch(port, path) for path in ("/samples/1", "/samples/1?source=hard", "/samples/9", "/samples/x")
        }
        assert main(["show", "last", "--socket", str(process.socket)]) == 0
        if browser_if_any is not None:
            _follow_the_link(browser_if_any, port, folder)
    (folder / "pages").write_text(json.dumps(pages))
    return folder


def _follow_the_link(browser: Browser, port: int, folder: Path) -> None:
    """From the page to the samples of a step, in a real browser."""
    with browser.tab(f"http://127.0.0.1:{port}/") as tab:
        tab.click("#steps a[href='/samples/1']")
        tab.wait_for("document.querySelectorAll('article.sample').length > 3")
        assert tab.evaluate("document.title") == "step 1", "what a prompt says is shown, not run"
        assert NASTY.split()[0] in tab.text("body")
        assert not tab.errors
        assert all(url.startswith((f"http://127.0.0.1:{port}/", "data:")) for url in tab.asked)
        tab.screenshot(folder / "samples.png")


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["show", *arguments]) == 0
    return capsys.readouterr().out


def test_a_step_is_printed_whole_and_the_worst_first(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    groups = list(read_groups(find_step(kept / "kept", 1)[0]))
    text = shown(capsys, "1", "--archive", str(kept / "kept"))
    assert "step 1 · policy version 0" in text
    for group in groups:
        assert f"group {group['group_index']} · prompt {group['prompt_index']}" in text
        for sample in group["samples"]:
            assert sample["response"].split()[0] in text
    assert "\x1b" not in text, "nothing steers the terminal"
    assert r"\x1b[31m" in text
    rewards = sorted(sample["reward"] for group in groups for sample in group["samples"])
    assert rewards[0] < rewards[-1]
    worst = shown(capsys, "1", "--config", str(kept / "config.yaml"), "--worst", "3")
    assert [float(number) for number in re.findall(r"^reward (\S+) ·", worst, re.MULTILINE)] == rewards[:3]
    lines = shown(capsys, "1", "--archive", str(kept / "kept"), "--source", "easy", "--json").splitlines()
    assert [json.loads(line) for line in lines] == [group for group in groups if group["source"] == "easy"]
    (line,) = shown(capsys, "1", "--archive", str(kept / "kept"), "--worst", "1", "--json").splitlines()
    assert json.loads(line)["sample"]["reward"] == rewards[0]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["9", "--archive", "kept"], 1, "step 9 is not in the archive kept; it has 3 steps, from 0 to 2"),
        (["1", "--archive", "kept", "--source", "medium"], 1, "has no group of 'medium'; it has groups of easy"),
        (["1", "--archive", "away"], 1, "away has no archived step"),
        (["1", "--socket", "away"], 1, "or name the archive: --archive DIRECTORY, or --config FILE"),
        (["first", "--archive", "kept"], 2, "the step must be a number or `last`, not 'first'"),
    ],
)
def test_what_is_not_there_is_said(
    kept: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    said: str,
) -> None:
    monkeypatch.chdir(kept)
    assert main(["show", *arguments]) == code
    assert said in capsys.readouterr().err


def test_the_page_of_a_step_has_some_of_its_samples_and_runs_nothing_of_them(kept: Path) -> None:
    pages = json.loads((kept / "pages").read_text())
    code, text = pages["/samples/1"]
    assert code == 200
    assert "<script" not in text
    groups = list(read_groups(find_step(kept / "kept", 1)[0]))
    assert html.escape(groups[0]["prompt"] if groups[0]["source"] == "easy" else NASTY) in text
    rewards = {
        name: sorted(s["reward"] for g in groups if g["source"] == name for s in g["samples"])
        for name in ("easy", "hard")
    }
    for name, part in re.findall(r"<h2><a[^>]*>(\w+)</a>(.*?)</section>", text):
        found = [float(number) for number in re.findall(r"<b>reward (\S+)</b>", part)]
        assert found[0] == rewards[name][0]
        assert found[-1] == rewards[name][-1]
        assert len(found) == min(6, len(rewards[name]))
    code, text = pages["/samples/1?source=hard"]
    assert code == 200
    assert "easy</a>" not in text
    code, text = pages["/samples/9"]
    assert code == 404
    assert "step 9 is not in the archive" in text
    assert pages["/samples/x"][0] == 404
