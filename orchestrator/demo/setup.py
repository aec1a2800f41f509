"""The folder of one run: its config, its state, its trainer.

Invariants:

* All files of a run are in its folder, so that a run whose folder is kept can be continued.
* The config is the shipped ``demo.yaml``, with the paths, seed, length and weights of this run.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

__all__ = ["SCHEDULES", "Places", "Schedule", "write_config"]

Schedule = Literal["curriculum", "mix", "hard-only"]

SCHEDULES: Final[dict[Schedule, list[Any] | None]] = {"curriculum": None, "mix": [1, 1], "hard-only": [0, 1]}
"""Weights of (easy, hard); ``None``: those of the config file, which follow the rewards."""

PACKAGE: Final = Path(__file__).resolve().parents[1]
SHIPPED: Final = PACKAGE / "shipped"
"""The repository's ``config`` and ``examples`` as an installed package has them."""

EXAMPLES: Final = "examples.curriculum_learning."


@dataclass(frozen=True, slots=True)
class Places:
    """Where the parts of a run are."""

    folder: Path

    @property
    def config(self) -> Path:
        """The daemon's config."""
        return self.folder / "config.json"

    @property
    def socket(self) -> Path:
        """The daemon's socket."""
        return self.folder / "socket"

    @property
    def log(self) -> Path:
        """The daemon's log, JSON lines."""
        return self.folder / "daemon.jsonl"

    @property
    def trainer(self) -> Path:
        """The trainer's folder: parameters, optimiser, ``progress.jsonl``."""
        return self.folder / "trainer"

    @property
    def progress(self) -> Path:
        """What the trainer records for each step."""
        return self.trainer / "progress.jsonl"

    @property
    def model(self) -> Path:
        """The first parameters, which the engine is started with."""
        return self.trainer / "policy-0.gguf"


def working_directory() -> Path:
    """The directory from which the example's modules can be imported, in a checkout and in an installed package."""
    return PACKAGE.parent


def example_module(name: str) -> str:
    """The dotted path of a module of ``examples/curriculum_learning``, from :func:`working_directory`."""
    return ("orchestrator.shipped.curriculum_learning." if SHIPPED.exists() else EXAMPLES) + name


def write_config(places: Places, *, schedule: Schedule, seed: int, steps: int, http: str | None) -> dict[str, Any]:
    """Write the run's config; returns it.

    Args:
        places: of the run.
        schedule: which weights.
        seed: of prompts, sampling and first parameters.
        steps: number of batches.
        http: address of the status page; ``None``: off.
    """
    from ruamel.yaml import YAML

    path = (SHIPPED if SHIPPED.exists() else PACKAGE.parent / "config") / "demo.yaml"
    data: dict[str, Any] = YAML(typ="safe", pure=True).load(path)
    data["run"] = {"name": f"demo-{schedule}-{seed}", "seed": seed, "state_dir": str(places.folder / "state")}
    data["rollout"]["num_rollout"] = steps
    data["engines"][0]["model"] = str(places.model)
    for source in data["data_sources"]:
        source["prompts"]["path"] = str(path.parent / source["prompts"]["path"])
    data |= {
        "consumer": {"socket": str(places.socket)},
        "logging": {"file": str(places.log)},
        "status": {"http": http},
    }
    weights = SCHEDULES[schedule] or data["data_source_weights"]
    data["data_source_weights"] = [_here(weight) for weight in weights]
    places.folder.mkdir(parents=True, exist_ok=True)
    places.config.write_text(json.dumps(data, indent=1))
    return data


def _here(weight: Any) -> Any:
    if isinstance(weight, str) and weight.startswith(EXAMPLES):
        return example_module(weight.removeprefix(EXAMPLES))
    return weight
