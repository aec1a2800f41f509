"""Log lines: ECS JSON for Elasticsearch, or text for a person at a terminal.

``lines`` formats a line, ``writer`` writes it to its file or stream, ``record_lines`` has the lines for records of the
state log, ``recent`` remembers the last lines, ``handle`` joins them.
"""

from .handle import LogHandle, StepFigures, configure_logging

__all__ = ["LogHandle", "StepFigures", "configure_logging"]
