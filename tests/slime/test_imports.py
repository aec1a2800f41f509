"""What the surface for slime drags into slime's process: nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

HEAVY = {"torch", "slime", "anyio", "asyncio", "pydantic", "msgspec", "aiohttp", "numpy", "pyarrow", "orjson", "uvloop"}
MODULES = ("data_source", "custom_log", "reward_cap_filter")


@pytest.mark.parametrize("module", MODULES)
def test_importing_loads_none_of_the_large_ones(module: str) -> None:
    program = f"import sys, orchestrator.{module}; print(*sorted(set(sys.modules) & {HEAVY!r}))"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=30, check=True, capture_output=True)
    assert run.stdout.decode().strip() == ""


def test_it_works_where_nothing_is_installed(tmp_path: Path) -> None:
    """In a process without site-packages: prompts, mixture, checkpoint, metrics."""
    program = """
import sys
from argparse import Namespace
from importlib.util import find_spec

assert find_spec("anyio") is find_spec("numpy") is None
from orchestrator.custom_log import custom_rollout_log_function
from orchestrator.data_source import MultipleWeightedRolloutDataSourceWithBuffer as DataSource
from orchestrator.reward_cap_filter import check_reward_cap_per_source

directory = sys.argv[1]
args = Namespace(
    prompt_data=["config/data/easy_sums.jsonl", "config/data/hard_sums.jsonl"], data_source_weights=[3, 1],
    rollout_batch_size=4, input_key="prompt", save=directory, load=directory, data_source_reward_caps=[0.5, None],
)
data = DataSource(args)
groups = data.get_samples(8)
data.save(0)
DataSource(args).load(0)
for group in groups:
    group[0].reward = 1.0
extra = {}
custom_rollout_log_function(0, args, [group[0] for group in groups], extra, 1.0)
kept = sum(check_reward_cap_per_source(args, group).keep for group in groups)
print(extra["rollout/easy_sums/sample_count"], extra["rollout/hard_sums/sample_count"], kept)
"""
    run = subprocess.run(
        [sys.executable, "-S", "-E", "-c", program, str(tmp_path)],
        cwd=ROOT,
        timeout=30,
        check=False,
        capture_output=True,
    )
    assert run.returncode == 0, run.stderr.decode()
    assert run.stdout.decode().split() == ["6", "2", "2"]
