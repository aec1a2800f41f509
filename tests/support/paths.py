"""Where things lie in the repository, for tests that start programs or read files of it."""

from __future__ import annotations

from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
"""The repository."""

TESTS: Final = ROOT / "tests"
STATE_V1: Final = TESTS / "fixtures" / "state-v1"
"""A state directory as the first build wrote it."""
STATE_V2: Final = TESTS / "fixtures" / "state-v2"
"""A state directory as the last build before the modules moved into folders wrote it."""
