"""The pages that say how to add a kind are followed, word by word, in a copy of the sources; the result is run."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.errors import RunFinished
from tests.support.daemon_process import DaemonProcess
from tests.support.paths import ROOT

pytestmark = pytest.mark.timeout(120)

PAGES = {"adding-an-engine.md": 4, "adding-a-prompt-kind.md": 3, "adding-a-reward-kind.md": 3}
"""Files that may be touched for one more kind, docs and tests aside."""

ROWS = [{"prompt": "2+2=", "label": "4"}, {"prompt": "1+3=", "label": "4"}]
OURS = """
run: {state_dir: state}
consumer: {socket: sock}
status: {http: null}
logging: {file: log.jsonl}
"""


def block(page: str, language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)
    return str(found)


def apply(diff: str, text: str) -> str:
    """The text with the added lines of each hunk, where their neighbours stand."""
    for hunk in diff.split("@@\n"):
        lines = hunk.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if not line.startswith("+"))
        assert text.count(old) == 1, f"the page shows {old!r}, which is not in the registry once"
        text = text.replace(old, "".join(line[1:] for line in lines))
    return text


def files_of(root: Path) -> dict[Path, bytes]:
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def run(copy: Path, *command: str) -> str:
    answer = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=False, cwd=copy, timeout=50
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return answer.stdout


@pytest.mark.parametrize("name", PAGES)
def test_one_more_kind_is_one_file_and_its_registration(name: str, tmp_path: Path) -> None:
    page, copy = (ROOT / "docs" / name).read_text(encoding="utf-8"), tmp_path / "copy"
    for part in ("orchestrator", "config"):
        shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
    before = files_of(copy)
    new, registry = (copy / path for path in re.findall(r"`(orchestrator/\w+/\w+\.py)`:", page))
    assert not new.exists()
    new.write_text(block(page, "python"), encoding="utf-8")
    registry.write_text(apply(block(page, "diff"), registry.read_text(encoding="utf-8")), encoding="utf-8")
    run(copy, "-B", "-m", "orchestrator.config.schema", "config/orchestrator.schema.json")
    after = files_of(copy)
    touched = sorted(str(path) for path in after if after[path] != before.get(path))
    assert len(touched) <= PAGES[name], touched

    (copy / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (copy / "sums.csv").write_text("prompt,label\n2+2=,4\n1+3=,4\n")
    config = copy / "config.yaml"
    config.write_text(block(page, "yaml") + OURS)
    assert "OK" in run(copy, "-B", "-m", "orchestrator", "check", "config.yaml")
    process = DaemonProcess(config, directory=copy).start()
    try:
        with process.connect() as client:
            batch = client.get_batch(timeout_s=30)
            assert [len(group.samples) for group in batch.groups] == [2, 2]
            client.ack(batch.lease)
            with pytest.raises(RunFinished):
                client.get_batch(timeout_s=30)
    finally:
        process.close()
