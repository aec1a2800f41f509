"""What the journals of fake engines say of the samples that a trainer got: every token, and its version.

The version of a token is the one that was in force when its request was made: whatever changes the version cuts all
requests, or comes when there are none.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

from tests.campaigns.checks import Taken
from tests.campaigns.script import IDENTITY, problem_of
from tests.campaigns.storm import Change
from tests.support.fake_server import text_of

LENGTH: Final = (40, 240)
LIMIT: Final = 240

KILL_S: Final = 0.5
"""A server that was sending when the daemon was killed has sent something at most so long before."""


@dataclass
class Asked:
    """A request in the engines' journals that began to answer."""

    at: float
    given: int
    first_sent: float
    last_sent: float = 0.0
    sent: int = 0
    ended: float | None = None


def journal(paths: Sequence[Path]) -> dict[tuple[str, str], list[Asked]]:
    """By prompt and identity of the response: its requests in the order in which they were answered."""
    requests: dict[tuple[str, int, int], tuple[tuple[str, str], Asked]] = {}
    for line in (line for path in paths for line in path.read_text().splitlines()):
        entry = json.loads(line)
        key = (entry["engine"], entry["life"], entry["number"])
        if entry["kind"] == "ask":
            asked = Asked(entry["at"], entry["given"], 0.0)
            requests[key] = ((entry["prompt"], entry["identity"]), asked)
            continue
        asked = requests[key][1]
        asked.first_sent = asked.first_sent or entry["at"]
        asked.last_sent, asked.sent = entry["at"], entry["upto"]
        if entry["reason"] in ("stop", "length"):
            asked.ended = entry["at"]
    found: dict[tuple[str, str], list[Asked]] = defaultdict(list)
    for response, asked in requests.values():
        if asked.sent > asked.given:
            found[response].append(asked)
    for row in found.values():
        row.sort(key=lambda asked: asked.first_sent)
    return found


class Journals:
    """Holds samples to the journals of the engines.

    ``again``: responses that were generated beyond an end that had been sent, though no daemon was killed between.
    """

    def __init__(self, paths: Sequence[Path], changes: Sequence[Change], kills: Sequence[float]) -> None:
        self._responses = journal(paths)
        self._changes = changes
        self._kills = kills
        self.again = 0
        self._seen: set[tuple[str, str]] = set()

    def problem(self, sample: Taken) -> str | None:
        """What is wrong with a sample: its tokens, its log-probabilities, or the version of a token."""
        found = problem_of(sample.prompt, sample.tokens, sample.logprobs, length=LENGTH, limit=LIMIT)
        if found is not None:
            return found
        response = (text_of(sample.prompt), text_of(sample.tokens[:IDENTITY]))
        if response not in self._responses:
            return "no engine knows of it"
        self._seen.add(response)
        row = self._responses[response]
        for before, after in pairwise(row):
            is_again = before.ended is not None and after.given < len(sample.tokens)
            self.again += is_again and not any(before.first_sent < kill < after.at for kill in self._kills)
        for at, version in enumerate(sample.versions):
            source = [asked for asked in row if asked.given <= at][-1]
            if source.sent <= at:
                return f"token {at} was never sent: {row}"
            if version not in self._versions(source):
                return f"token {at} has version {version}, {self._versions(source)} expected: {row}, {self._changes}"
        return None

    def lost(self) -> int:
        """Responses that were begun and are no sample's, though no daemon was killed that was receiving them."""
        return sum(
            max(asked.sent for asked in row) >= 3 * IDENTITY
            and not any(row[0].first_sent < kill < row[-1].last_sent + KILL_S for kill in self._kills)
            for response, row in self._responses.items()
            if response not in self._seen
        )

    def _versions(self, asked: Asked) -> set[int]:
        """Those in force when it was asked, and those of changes that were not bracketed meanwhile."""
        before = [change.version for change in self._changes if change.end <= asked.at][-1]
        during = {
            change.version
            for change in self._changes
            if asked.at < change.end and change.begin <= (asked.at if change.is_bracketed else asked.last_sent)
        }
        return {before} | during
