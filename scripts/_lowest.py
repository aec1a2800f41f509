"""Print the lowest versions that pyproject.toml allows, as pins for pip: python scripts/_lowest.py pyproject.toml

Invariants:

* Every dependency of the package, its extras and its groups has one lower bound, ``name>=X``, and gets ``name==X``.
* A bound that names no release is therefore an error of pip: the pins are what the file says, not what pip makes of it.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)(\[[\w,.-]+\])?>=(?P<lowest>[\w.]+)(?P<rest>[,;].*)?")


def pins(pyproject: Path) -> list[str]:
    """One line ``name==X`` for each direct dependency; raises ``ValueError`` for one without a lower bound."""
    read = tomllib.loads(pyproject.read_text())
    project = read["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values(), *read["dependency-groups"].values()]
    lines = set()
    for requirement in (one for group in groups for one in group):
        if (bound := REQUIREMENT.fullmatch(requirement.replace(" ", ""))) is None:
            raise ValueError(f"{pyproject}: {requirement!r} has no lower bound; write it as 'name>=X'")
        lines.add(f"{bound['name']}=={bound['lowest']}")
    return sorted(lines)


if __name__ == "__main__":
    print("\n".join(pins(Path(sys.argv[1]))))
