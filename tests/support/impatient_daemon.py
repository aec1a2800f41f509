"""``orchestrator run`` with other constants, for deadlines that a test can wait for.

As a program: ``python -m tests.support.impatient_daemon CONFIG MODULE.NAME=VALUE …``.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.daemon_process import DaemonProcess
from tests.support.paths import ROOT


class ImpatientDaemon(DaemonProcess):
    def __init__(self, config: Path, **constants: float) -> None:
        super().__init__(config)
        self._constants = [f"{name.replace('__', '.')}={value}" for name, value in constants.items()]

    def start(self, *options: str) -> ImpatientDaemon:
        with (self.config.parent / "stderr").open("ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "error", "-m", __name__, str(self.config), *self._constants, *options],
                stdout=errors,
                stderr=errors,
                cwd=ROOT,
            )
        return self


@contextmanager
def impatient_daemon(config: Path, **constants: float) -> Iterator[ImpatientDaemon]:
    """A running daemon; ``socket__send_queue__SEND_STALL_S=0.5`` is set in ``orchestrator.consumer``."""
    process = ImpatientDaemon(config, **constants).start()
    try:
        yield process
    finally:
        process.close()


def main() -> None:
    from orchestrator.cli.run import run

    config, *constants = sys.argv[1:]
    for constant in constants:
        name, _, value = constant.partition("=")
        module, _, attribute = name.rpartition(".")
        found = importlib.import_module(f"orchestrator.consumer.{module}")
        assert hasattr(found, attribute)
        setattr(found, attribute, float(value))
    run(Path(config))


if __name__ == "__main__":
    main()
