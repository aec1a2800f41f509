"""The demo writes a config of its own from the one that it is given; the daemon has to take it."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.cli.demo import _write_config
from orchestrator.config import load_config

CONFIGS = Path(__file__).parents[1] / "config"


@pytest.mark.parametrize("name", ["demo.yaml", "curriculum.yaml", "minimal.yaml"])
def test_what_the_demo_writes_loads(tmp_path: Path, name: str) -> None:
    _write_config(CONFIGS / name, tmp_path, 3)
    config = load_config(tmp_path / "config.yaml")
    assert config.rollout.num_rollout == 3
    assert config.source_names == load_config(CONFIGS / name).source_names
