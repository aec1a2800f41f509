"""The command line.

Invariants:

* Modules of commands import what is heavy when a command runs, so that ``--help`` is quick.
* Exit codes are those of ``exit_codes``; every error that is ours ends as one plain message, never as a traceback.
* Every ``--help`` ends with an example.
"""

from __future__ import annotations

import sys

from cyclopts import App, CycloptsError

from orchestrator import __version__
from orchestrator.errors import AlreadyRunning, ConfigError, OrchestratorError

from .exit_codes import BAD_CONFIG, FAILED, OK, TAKEN, USAGE

__all__ = ["app", "main"]

app = App(
    name="orchestrator",
    help="The daemon between inference servers and a reinforcement-learning trainer.",
    help_format="plaintext",
    help_epilogue="Example: orchestrator check config/minimal.yaml && orchestrator run config/minimal.yaml",
    version=__version__,
    result_action="return_value",
)

_COMMANDS = {
    "run": ("run:run", "Example: orchestrator run config/minimal.yaml"),
    "check": ("check:check", "Example: orchestrator check config/curriculum.yaml"),
    "weights": (
        "weights:weights",
        "Example: orchestrator weights config/curriculum.yaml --steps 200 --plot weights.png",
    ),
    "status": ("status:status", "Example: orchestrator status --socket run/orchestrator.sock"),
    "demo": ("demo:demo", "Example: orchestrator demo --batches 12"),
    "set-weight": ("live:set_weight", "Example: orchestrator set-weight hard 'lambda step: min(1, step / 100)'"),
    "pause": ("live:pause", "Example: orchestrator pause hard"),
    "resume": ("live:resume", "Example: orchestrator resume hard"),
    "drain": ("live:drain", "Example: orchestrator drain && kill $(orchestrator status --json | jq .run.pid)"),
}

for _name, (_path, _example) in _COMMANDS.items():
    app.command(f"orchestrator.cli.{_path}", name=_name, help_epilogue=_example)


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    try:
        result = app(arguments, exit_on_error=False, print_error=True)
    except CycloptsError:
        return USAGE
    except ConfigError as error:
        print(error, file=sys.stderr)
        return BAD_CONFIG
    except AlreadyRunning as error:
        print(f"orchestrator: {error}", file=sys.stderr)
        return TAKEN
    except OrchestratorError as error:
        print(f"orchestrator: {error}", file=sys.stderr)
        return FAILED
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        sys.stderr.close()
        return OK
    return result if isinstance(result, int) else OK
