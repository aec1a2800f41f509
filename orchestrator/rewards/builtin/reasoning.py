"""The reward ``reasoning_gym``: the task's own judgement of an answer to one of its entries.

It runs in a worker process. The entry is made again there, because tasks look into what JSON cannot carry (tuples,
keys that are numbers) and would judge a copy otherwise.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Final

import orjson

from orchestrator.concurrency.processes.reasoning_tasks import BadTask, Entries, TaskSpec
from orchestrator.errors import RewardError
from orchestrator.records import Prompt, Sample
from orchestrator.rewards.verdict import describe_exception

__all__ = ["extract_answer", "score"]

OPENING: Final = "<answer>"
CLOSING: Final = "</answer>"


def extract_answer(text: str) -> str:
    """What follows the last ``<answer>``, up to its ``</answer>`` where there is one; else all of it. Stripped."""
    _, _, rest = text.rpartition(OPENING)
    return rest.partition(CLOSING)[0].strip() if OPENING in text else text.strip()


def score(sample: Sample, prompt: Prompt) -> float | dict[str, Any]:
    """The task's ``score_answer``, mostly from 0 to 1.

    Tasks exist that raise on answers which they cannot read ("no idea" where numbers are expected). Where the task's
    own answer is judged without an error, such an answer is wrong: 0, with the error in the sample's metadata.

    Raises:
        RewardError: the prompt is not an entry of a task, or the task cannot judge its own answer either.
    """
    spec = prompt.metadata.get("reasoning_gym")
    if not isinstance(spec, dict):
        raise RewardError(
            f"reward reasoning_gym: prompt {prompt.prompt_index} of source {prompt.source} must come from a source "
            "`prompts: {path: reasoning_gym:TASK}`"
        )
    entries = _entries(orjson.dumps(spec, option=orjson.OPT_SORT_KEYS))
    entry = entries.entry(prompt.prompt_index)
    try:
        return float(entries.dataset.score_answer(extract_answer(sample.text), entry))
    except Exception as error:  # noqa: BLE001 - the answer's fault or the task's own, which is found out
        try:
            entries.dataset.score_answer(entry["answer"], entry)
        except Exception as own:  # noqa: BLE001 - whatever a task raises
            raise RewardError(f"reward reasoning_gym: {spec['task']} raised {describe_exception(own)}") from error
        return {"score": 0.0, "raised": describe_exception(error)}


@lru_cache(maxsize=16)
def _entries(spec: bytes) -> Entries:
    try:
        return Entries(TaskSpec(**orjson.loads(spec)))
    except BadTask as error:
        raise RewardError(f"reward reasoning_gym: {error}") from error
