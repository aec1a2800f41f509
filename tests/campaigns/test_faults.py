"""A proxy that spoils what engines say: nothing leaks, every token is right. The whole: ``scripts/torture/faults``."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.campaigns.faults import run_daemon, run_in_process

pytestmark = pytest.mark.timeout(180)


async def test_no_task_no_socket_and_no_memory_leaks_in_a_pool_behind_faulty_connections() -> None:
    await run_in_process(samples=150, seed=1)


def test_no_descriptor_and_no_memory_leaks_in_a_daemon_behind_faulty_connections(tmp_path: Path) -> None:
    run_daemon(tmp_path, batches=12, minutes=0.0, seed=1)
