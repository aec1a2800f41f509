"""Small real things for the tests of slime's surface: options, prompt files, and a package that stands in for slime."""

from __future__ import annotations

import copy
import json
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.slime.data_source import MultipleWeightedRolloutDataSourceWithBuffer

DataSource = MultipleWeightedRolloutDataSourceWithBuffer


def write_prompts(path: Path, rows: int, name: str = "") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    name = name or path.stem
    lines = (json.dumps({"input": f"{name} {i}", "answer": str(i), "metadata": {"row": i}}) for i in range(rows))
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


def make_args(directory: Path, weights: Mapping[str, Any], *, rows: int = 7, **options: Any) -> Namespace:
    """Options for sources of these names and weights, each with a file of its own."""
    defaults: dict[str, Any] = {
        "prompt_data": [write_prompts(directory / f"{name}.jsonl", rows) for name in weights],
        "prompt_data_source_names": list(weights),
        "data_source_weights": list(weights.values()),
        "rollout_batch_size": 4,
        "n_samples_per_prompt": 2,
        "label_key": "answer",
        "save": str(directory / "checkpoints"),
        "load": str(directory / "checkpoints"),
    }
    return Namespace(**(defaults | options))


def sources(groups: Iterable[Sequence[Any]]) -> list[str]:
    return [group[0].metadata["data_source"] for group in groups]


def counted(groups: Iterable[Sequence[Any]]) -> dict[str, int]:
    return dict(Counter(sources(groups)))


def steps(groups: Iterable[Sequence[Any]]) -> list[int]:
    return [group[0].metadata["data_source_rollout_step"] for group in groups]


def plain(groups: Iterable[Sequence[Any]]) -> list[list[dict[str, Any]]]:
    """Groups as values that can be compared, as they are now."""
    return [[copy.deepcopy(sample.to_dict()) for sample in group] for group in groups]


STAND_IN = {
    "slime/__init__.py": "",
    "slime/utils/__init__.py": "",
    "slime/utils/types.py": """
from dataclasses import dataclass, field, asdict
from enum import Enum

class Status(Enum):
    PENDING = "pending"
    ABORTED = "aborted"
    COMPLETED = "completed"
    TRUNCATED = "truncated"
    FAILED = "failed"

@dataclass
class Sample:
    group_index: int = None
    index: int = None
    prompt: object = ""
    tokens: list = field(default_factory=list)
    response: str = ""
    response_length: int = 0
    label: object = None
    reward: object = None
    metadata: dict = field(default_factory=dict)
    status: Status = Status.PENDING
    of_slime: bool = True

    def to_dict(self):
        return {**vars(self), "status": self.status.value}

    @staticmethod
    def from_dict(data):
        return Sample(**{**data, "status": Status(data["status"])})
""",
    "slime/utils/tracking_utils.py": """
ROWS = []

def log(args, metrics, step_key):
    ROWS.append((metrics, step_key))
""",
    "slime/utils/metric_utils.py": "def compute_rollout_step(args, rollout_id):\n    return 10 * rollout_id\n",
    "slime/utils/processing_utils.py": """
class Tokenizer:
    def apply_chat_template(self, messages, tools, tokenize, add_generation_prompt, **kwargs):
        text = "".join(f"<{m['role']}>{m['content']}" for m in messages)
        return f"{text}<assistant>{[t['name'] for t in tools or []]}{kwargs}"
    def encode(self, text, add_special_tokens):
        return text.split()

def load_tokenizer(name, trust_remote_code):
    assert name == "a-model"
    return Tokenizer()
""",
    "slime/rollout/__init__.py": "",
    "slime/rollout/filter_hub/__init__.py": "",
    "slime/rollout/filter_hub/base_types.py": """
from dataclasses import dataclass

@dataclass
class DynamicFilterOutput:
    keep: bool
    reason: str = None
""",
}
"""Modules with the names and signatures that our surface uses of slime."""


def write_stand_in(directory: Path) -> None:
    for name, text in STAND_IN.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
