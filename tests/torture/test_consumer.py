"""Samples of ``scripts/torture/frames`` and ``scripts/torture/slow-clients``, by their own programs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.torture import frames as torture_frames
from tests.torture import slow_clients as torture_slow_clients

pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize("seed", [1, 2])
def test_frames_that_no_client_means_change_nothing(tmp_path: Path, seed: int) -> None:
    outcome = torture_frames.run(tmp_path, count=6_000, seed=seed)
    torture_frames.check(outcome)
    assert outcome.tally.frames >= 6_000
    assert {"bad_request", "bad_frame", "lease_expired", "unknown_source", "result"} <= set(outcome.tally.answers)


def test_a_trainer_goes_on_beside_slow_and_silent_clients(tmp_path: Path) -> None:
    """Fewer connections may be than there are: a new client gets in nevertheless. Times are the script's concern."""
    outcome = torture_slow_clients.run(tmp_path, rounds=2, batches=30, idle=100, slow=40, limit=90)
    assert len(outcome.alone.batches) == len(outcome.beside.batches) == 60
    assert 80 <= outcome.connections <= 90
