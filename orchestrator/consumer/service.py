"""The service behind the socket: the table of methods, who is connected, and the greeting.

Invariants:

* A request reaches its method with parameters that were checked; what the methods promise is said in ``methods``.
* When a connection ends, its leases are free and its pause of the engines ends, at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from structlog.typing import FilteringBoundLogger

from orchestrator import __version__
from orchestrator.consumer.methods import params as m
from orchestrator.consumer.methods.engines import EngineControl
from orchestrator.consumer.methods.table import Method, Methods, who
from orchestrator.consumer.socket.connection import Answer, Connection
from orchestrator.consumer.socket.requests import Request
from orchestrator.core.ledger.ledger import Ledger
from orchestrator.errors import BadRequest, RankInUse
from orchestrator.frames import DEFAULT_MAX_PAYLOAD_BYTES

from .handout import Handouts

__all__ = ["ConsumerService"]

PROTOCOL: Final = 1

MAX_CLIENT_CHARS: Final = 80
"""Of the name that a client gives itself: the names of all of them are in one status."""


class ConsumerService:
    """See the module's invariants.

    Args:
        run_name: the run's name, for ``hello``.
        ledger: the run's facts, for ``hello``.
        handouts: who holds what.
        engines: told when a connection that may hold a pause ends.
        methods: of each subject.
        connections: filled with the live connections, by number.
        log: for what happens to connections.
    """

    def __init__(
        self,
        *,
        run_name: str,
        ledger: Ledger,
        handouts: Handouts,
        engines: EngineControl,
        methods: Sequence[Methods],
        connections: dict[int, Connection],
        log: FilteringBoundLogger,
    ) -> None:
        self._run_name = run_name
        self._ledger = ledger
        self._handouts = handouts
        self._engines = engines
        self._log = log
        self._methods: dict[str, Method] = {"hello": (m.Hello, self._hello)}
        for subject in methods:
            self._methods |= subject.methods()
        self.connections = connections

    async def handle(self, connection: Connection, request: Request) -> Answer:
        """Do what a request asks.

        Raises:
            OrchestratorError: its code and message are the answer.
        """
        if request.method not in self._methods:
            raise BadRequest(f"unknown method {request.method[:80]!r}; use one of {', '.join(self._methods)}")
        kind, method = self._methods[request.method]
        return await method(connection, m.parse_params(kind, request.method, request.params))

    def opened(self, connection: Connection) -> None:
        """A client connected."""
        self.connections[connection.holder.connection] = connection

    def closed(self, connection: Connection) -> None:
        """A client went: its leases are free, its pause ends."""
        del self.connections[connection.holder.connection]
        if leases := self._handouts.leases_of(connection.holder):
            self._log.info(
                f"{who(connection)} disconnected with {len(leases)} leases, which will be handed out again",
                action="left",
                pid=connection.holder.pid,
            )
        self._handouts.leave(connection.holder)
        self._engines.left(connection.holder.connection)

    def holds_nothing(self, connection: Connection) -> bool:
        """Whether closing the connection costs its client no more than connecting again."""
        holder = connection.holder
        return not (
            connection.is_waiting or self._handouts.is_used_by(holder) or self._engines.is_paused_by(holder.connection)
        )

    def is_at_work(self, connection: Connection) -> bool:
        """Whether the client has a batch in hand that was sent to it whole."""
        connection.delivered &= self._handouts.leases_of(connection.holder)
        return bool(connection.delivered)

    async def _hello(self, connection: Connection, params: m.Hello) -> Answer:
        if params.protocol != PROTOCOL:
            raise BadRequest(f"protocol {params.protocol} is not supported; use protocol {PROTOCOL}")
        connection.client = "".join(c if c.isprintable() else "?" for c in params.client[:MAX_CLIENT_CHARS])
        if params.rank is not None:
            displaced = self._handouts.take_rank(connection.holder, params.rank, takeover=params.takeover)
            if displaced is not None and displaced.connection in self.connections:
                self.connections[displaced.connection].close(_taken_over(params.rank, connection))
        return Answer(
            {
                "server": "rollout-orchestrator",
                "version": __version__,
                "protocol": PROTOCOL,
                "max_payload": DEFAULT_MAX_PAYLOAD_BYTES,
                "run": self._run_name,
                "sources": list(self._ledger.sources),
                "step": self._ledger.step,
                "policy_version": self._ledger.policy_version,
                "by_file": True,
            }
        )


def _taken_over(rank: int, by: Connection) -> RankInUse:
    return RankInUse(
        f"rank {rank} was taken over by process {by.holder.pid}, which also gets the unacknowledged leases; stop one of"
        " the two trainers",
        data={"rank": rank, "pid": by.holder.pid},
    )
