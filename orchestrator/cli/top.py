"""``orchestrator top``: the state of a run in the terminal, updated every second."""

from __future__ import annotations

import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from .live import CONNECT_TIMEOUT_S, Socket

if TYPE_CHECKING:
    from collections.abc import Mapping

    from orchestrator.client import RolloutClient

__all__ = ["top"]

HISTORY_STEPS = 60
"""As many as fit in a line."""

NO_TERMINAL = 1


def top(*, socket: Socket = None, interval: Annotated[float, Parameter(help="Seconds between updates.")] = 1.0) -> int:
    """Watch a running daemon in the terminal. Press q or Ctrl-C to quit.

    It shows the figures of the live page and reconnects when the daemon
    restarts. 80 columns by 24 lines are enough.

    Parameters
    ----------
    socket
        The daemon's socket.
    """
    from orchestrator.client import RolloutClient

    if not sys.stdout.isatty():
        print("orchestrator: top needs a terminal; use `orchestrator status` instead", file=sys.stderr)
        return NO_TERMINAL
    client = RolloutClient(socket, connect_timeout_s=CONNECT_TIMEOUT_S, client="orchestrator top")
    try:
        client.connect()  # a daemon that is not running now is an error; if it goes away later, we wait for it
        _watch(client, max(0.1, interval))
    except KeyboardInterrupt:
        pass
    finally:
        client.close()
    return 0


def _watch(client: RolloutClient, interval: float) -> None:
    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

    from orchestrator.errors import ConnectionLost

    from .screen import render_screen

    console, rate = Console(highlight=False), _Rate()
    status: dict[str, Any] | None = None
    with _single_keys() as has_keys, Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            try:
                status = client.status(history=HISTORY_STEPS)
                lines = render_screen(status, console.width, console.height, tokens_per_s=rate.of(status))
            except ConnectionLost as error:
                lines = [Text(f"no daemon, retrying, q: quit ({error})", style="bold white on red", no_wrap=True)]
                lines[0].truncate(console.width, overflow="ellipsis")
                if status is not None:
                    lines += render_screen(status, console.width, console.height - 1)
            live.update(Group(*lines), refresh=True)
            if _pressed_q(interval, has_keys=has_keys):
                return


class _Rate:
    """Tokens a second over all engines, smoothed."""

    def __init__(self) -> None:
        self._before: tuple[int, float, int] | None = None
        self._rate: float | None = None

    def of(self, status: Mapping[str, Any]) -> float | None:
        """The rate after this status; ``None``: not known yet."""
        now = (status["run"]["pid"], status["time"], sum(engine["tokens"] for engine in status["engines"]))
        before, self._before = self._before, now
        if before is None or before[0] != now[0] or now[1] <= before[1]:
            self._rate = None
            return None
        rate = max(0, now[2] - before[2]) / (now[1] - before[1])
        self._rate = rate if self._rate is None else 0.7 * self._rate + 0.3 * rate
        return self._rate


@contextmanager
def _single_keys() -> Iterator[bool]:
    """Keys arrive without Enter and are not shown, where there is a keyboard."""
    if not sys.stdin.isatty():
        yield False
        return
    import termios
    import tty

    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin)
        yield True
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _pressed_q(seconds: float, *, has_keys: bool) -> bool:
    """Wait for a key, at most that long; whether it was ``q``."""
    ready, _, _ = select.select([sys.stdin] if has_keys else [], [], [], seconds)
    return bool(ready) and sys.stdin.read(1) in ("q", "Q", "")
