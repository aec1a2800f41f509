"""One bad engine costs only its share: of four engines three are bad, and the healthy one gives what it gives alone.

A bounded sample; the whole: ``scripts/torture/bad-engines``.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.campaigns.bad_engines import check, run


@pytest.mark.timeout(180)
def test_three_bad_engines_of_four_cost_less_than_a_third_of_what_the_healthy_one_gives(tmp_path: Path) -> None:
    check(run(tmp_path, batches=18, seed=1, only_generations=True))
