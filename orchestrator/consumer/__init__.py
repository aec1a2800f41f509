"""The consumer API: leases on a Unix socket (``docs/protocol.md``)."""

from orchestrator.consumer.socket.connection import Connection
from orchestrator.consumer.socket.server import ConsumerServer

from .handout import Handout, Handouts
from .service import ConsumerService

__all__ = ["Connection", "ConsumerServer", "ConsumerService", "Handout", "Handouts"]
