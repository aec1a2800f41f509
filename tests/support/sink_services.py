"""What runs in a sink's process in tests: it writes what it is given to a file, and misbehaves where a file says so.

The file ``mood`` beside it holds ``hang``, ``die`` or an error's text; without it all is well.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.concurrency.processes import ServiceRefused


def serve(options: dict[str, Any]) -> Callable[[dict[str, Any], bytes], dict[str, Any]]:
    folder = Path(options["folder"])
    if (folder / "refusal").exists():
        raise ServiceRefused((folder / "refusal").read_text())

    def call(header: dict[str, Any], _: bytes) -> dict[str, Any]:
        mood = (folder / "mood").read_text() if (folder / "mood").exists() else ""
        if mood == "hang":
            signal.pause()
        if mood == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if mood:
            return {"error": mood}
        with (folder / "taken").open("a") as file:
            file.writelines(json.dumps(step) + "\n" for step in header.get("steps", ()))
            if header.get("finish"):
                file.write('"finished"\n')
        return {}

    return call
