"""How a run stands, in one sentence: what it says and how loud."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.status.headline import headline

HELD = {"step": 4, "held_s": 75.0}
FREE = {"step": 4, "held_s": None}


def cause(kind: str, *of_sources: str) -> dict[str, Any]:
    return {"kind": kind, "sentence": "because", "sources": [{"kind": each} for each in of_sources]}


def status(**changes: Any) -> dict[str, Any]:
    waits = {"waiting": changes.pop("waiting", 0), "waiting_s": changes.pop("waiting_s", None)}
    plain: dict[str, Any] = {
        "step": 5,
        "is_finished": False,
        "leases": [],
        "cause": None,
        "starvation": waits,
        "state": {"fault": changes.pop("fault", None)},
        "generation": {"draining": changes.pop("draining", False)},
    }
    return plain | changes


@pytest.mark.parametrize(
    ("given", "level", "text"),
    [
        ({}, "good", "No trainer holds a batch. The next batch is ready."),
        ({"leases": [HELD]}, "good", "The trainer has been working on step 4 for 1 min 15 s. The next batch is ready."),
        ({"leases": [FREE]}, "good", "No trainer holds step 4; it is not acknowledged and will be handed out again."),
        ({"is_finished": True}, "quiet", "The run is finished after 5 batches."),
        ({"is_finished": True, "leases": [HELD]}, "good", "This is the end of the run."),
        ({"cause": cause("sources", "filter"), "waiting": 1, "waiting_s": 9.0}, "late", "waiting for 9 s. Because"),
        ({"cause": cause("sources", "filter"), "waiting": 1, "waiting_s": 1.0}, "waiting", "waiting for 1 s. Because"),
        ({"cause": cause("sources", "filter"), "waiting": 1}, "waiting", "The trainer is waiting. Because"),
        ({"cause": cause("trainer"), "waiting": 1}, "waiting", "No batch for now. Because"),
        (
            {"cause": cause("sources", "generation"), "leases": [HELD]},
            "good",
            "The next batch is not ready. Because",
        ),
        ({"cause": cause("paused", "paused"), "leases": [HELD]}, "good", "The next batch is not ready. Because"),
        ({"cause": cause("sources", "generation")}, "waiting", "No trainer holds a batch. The next batch is not ready"),
        ({"cause": cause("sources", "generation", "filter"), "leases": [HELD]}, "waiting", "is not ready. Because"),
        ({"cause": cause("engines", "engines"), "leases": [HELD]}, "waiting", "is not ready. Because"),
        ({"fault": "no room", "leases": [HELD]}, "late", "The state cannot be written: no room"),
        ({"draining": True, "cause": cause("draining")}, "waiting", "Drained"),
    ],
)
def test_the_sentence_and_how_loud_it_is(given: dict[str, Any], level: str, text: str) -> None:
    said = headline(status(**given))
    assert said["level"] == level
    assert text in said["text"]
