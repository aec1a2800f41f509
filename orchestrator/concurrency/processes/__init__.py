"""Processes for code that may hang, crash or eat the loop's time: user's functions, foreign packages.

:class:`ProcessPool` is the way in. What a process serves is a *service*: the dotted path of a function that takes the
options of the set-up and returns ``(header, data) -> answer``, all of them JSON and bytes.
"""

from .messages import ProcessFailed, ProcessTimeout, ServiceRefused
from .pool import ProcessPool

__all__ = ["ProcessFailed", "ProcessPool", "ProcessTimeout", "ServiceRefused"]
