"""The reward ``math_verify``: whether the response's last answer is mathematically the label.

It runs in a worker process: parsing and comparing can take for ever on what a model writes. Math-Verify's own timeouts
are off: they work by ``signal.alarm`` and turn what took too long into "not equal", and so a zero that nobody gave.
"""

from __future__ import annotations

import logging
from typing import Any, Final

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from orchestrator.errors import RewardError
from orchestrator.records import Prompt, Sample

__all__ = ["score"]

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of calls without its own timeout

FORMS: Final = (LatexExtractionConfig(), ExprExtractionConfig())
"""LaTeX (``$\\frac{1}{2}$``, ``\\boxed{…}``) and plain expressions (``1/2``)."""

MARKS: Final = ("$", "\\boxed", "\\(", "\\[", "\\begin")
"""What LaTeX in a text begins with; a label without any is taken for mathematics as a whole."""


def score(sample: Sample, prompt: Prompt) -> float:
    """1.0 where the answer that is extracted from the response equals the label, else 0.0.

    Raises:
        RewardError: the label is no text or number, or no mathematics can be read in it.
    """
    label = prompt.label
    place = f"the label of prompt {prompt.prompt_index} of source {prompt.source}"
    if isinstance(label, bool) or not isinstance(label, str | int | float):
        raise RewardError(f"reward math_verify: {place} is {label!r:.200}; it must be a string or a number")
    text = str(label).strip()
    gold = _parse(text if any(mark in text for mark in MARKS) else f"${text}$")
    if not gold:
        raise RewardError(f"reward math_verify: found no mathematics in {place}, {text!r:.200}")
    return float(verify(gold, _parse(sample.text), timeout_seconds=None))


def _parse(text: str) -> list[Any]:
    parsed: list[Any] = parse(text, FORMS, parsing_timeout=None)
    return parsed
