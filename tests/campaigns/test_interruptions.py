"""Generations interrupted at random moments: every prompt ends once, with what the engines know that they produced.

Bounded samples; the whole: ``scripts/torture/interruptions``.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest

from tests.campaigns.exact import play
from tests.campaigns.interruptions import run_fake, run_real
from tests.support.engine_time import JUMPING

pytestmark = pytest.mark.timeout(180)


@pytest.mark.parametrize("has_faults", [False, True])
@pytest.mark.parametrize("masks", [False, True])
def test_hundreds_of_interruptions_in_one_process_are_exact_to_the_token(has_faults: bool, masks: bool) -> None:
    how: dict[str, Any] = {"has_faults": has_faults, "masks": masks}
    scene = anyio.run(partial(play, seed=1, rows=18, **how), backend_options=dict(JUMPING))
    assert scene.check() >= 400
    assert set(scene.events) >= {"version", "pause abort", "pause finish", "park"}


def test_interrupted_servers_and_daemons_lose_no_token_and_end_every_prompt_once(tmp_path: Path) -> None:
    run_fake(tmp_path, cuts=25, seed=1)


def test_a_greedy_response_of_a_real_server_is_the_same_however_often_it_is_interrupted(tmp_path: Path) -> None:
    run_real(tmp_path, cuts=12, seed=1, tokens=160)
