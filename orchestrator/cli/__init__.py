"""The command line.

Invariants:

* Command modules import heavy dependencies only when a command runs, so that ``--help`` is fast.
* Exit codes are those of ``exit_codes``. Every error of our own is printed as one plain message, never as a traceback.
* Every ``--help`` ends with an example.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from cyclopts import App, CycloptsError

from orchestrator import __version__
from orchestrator.errors import AlreadyRunning, ConfigError, ConfigRefused, OrchestratorError

from .check import check
from .checkpoint import checkpoint
from .demo import demo
from .engines import engines
from .exit_codes import BAD_CONFIG, FAILED, OK, TAKEN, USAGE
from .live import drain, pause, reload, resume, set_weight
from .run import run
from .show import show
from .sources import sources
from .status import status
from .top import top
from .weights import weights

__all__ = ["app", "main"]

app = App(
    name="orchestrator",
    help="The daemon between inference servers and a reinforcement-learning trainer.",
    help_format="plaintext",
    help_epilogue="Example: orchestrator check config/minimal.yaml && orchestrator run config/minimal.yaml",
    version=__version__,
    result_action="return_value",
)

_EXAMPLES: dict[Callable[..., Any], str] = {
    run: "orchestrator run config/minimal.yaml",
    check: "orchestrator check config/curriculum.yaml",
    weights: "orchestrator weights config/curriculum.yaml --steps 200 --plot weights.png",
    status: "orchestrator status --socket run/orchestrator.sock",
    top: "orchestrator top --socket run/orchestrator.sock",
    show: "orchestrator show 12 --source hard --worst 5 --archive archive",
    demo: "orchestrator demo --schedule mix --steps 300",
    set_weight: "orchestrator set-weight hard 'lambda step: min(1, step / 100)'",
    pause: "orchestrator pause hard",
    resume: "orchestrator resume hard",
    reload: "orchestrator reload --socket run/orchestrator.sock",
    drain: "orchestrator drain --socket run/orchestrator.sock",
}

for _command, _example in _EXAMPLES.items():
    app.command(_command, help_epilogue=f"Example: {_example}")
app.command(checkpoint)
app.command(engines)
app.command(sources)


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    try:
        result = app(arguments, exit_on_error=False, print_error=True)
        sys.stdout.flush()
    except CycloptsError:
        return USAGE
    except ConfigError as error:
        print(error, file=sys.stderr)
        return BAD_CONFIG
    except ConfigRefused as error:
        print(f"orchestrator: {error}", file=sys.stderr)
        return BAD_CONFIG
    except AlreadyRunning as error:
        print(f"orchestrator: {error}", file=sys.stderr)
        return TAKEN
    except OrchestratorError as error:
        print(f"orchestrator: {error}", file=sys.stderr)
        return FAILED
    except BrokenPipeError:
        return _discard_output()
    return result if isinstance(result, int) else OK


def _discard_output() -> int:
    """The reader closed the pipe, as `| head` does: send what Python still buffers to /dev/null, without an error."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return OK
