"""What the exit status of every command means; scripts and supervisors may rely on it.

75 and 78 are ``EX_TEMPFAIL`` and ``EX_CONFIG`` of ``sysexits.h``, so a supervisor can tell them apart without knowing
this program. With ``RestartPreventExitStatus=75 78`` systemd does not restart a daemon that cannot start.
"""

from __future__ import annotations

from typing import Final

__all__ = ["BAD_CONFIG", "FAILED", "OK", "TAKEN", "USAGE"]

OK: Final = 0
"""Done. For ``run``: stopped cleanly by a signal, or the run is finished."""

FAILED: Final = 1
"""Failed at run time; the message on standard error says why."""

USAGE: Final = 2
"""Wrong usage: an unknown command or option, or a bad value, as in every Unix command."""

TAKEN: Final = 75
"""Another daemon holds the state directory or the socket; the same command may succeed later."""

BAD_CONFIG: Final = 78
"""The configuration cannot be used; the same command fails until the file is changed."""
