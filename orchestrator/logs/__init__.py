"""Log lines: ECS JSON for Elasticsearch, or text for a person at a terminal.

``lines`` makes a line of what was said, ``writer`` brings it to its file or stream, ``journal`` says what the state log
records, ``recent`` remembers the last lines, ``handle`` joins them.
"""

from .handle import LogHandle, StepFigures, configure_logging

__all__ = ["LogHandle", "StepFigures", "configure_logging"]
