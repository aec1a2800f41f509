"""The consumer API: leases on a Unix socket (``docs/protocol.md``)."""

from .connection import Connection
from .desk import Handout, LeaseDesk
from .server import ConsumerServer
from .service import ConsumerService

__all__ = ["Connection", "ConsumerServer", "ConsumerService", "Handout", "LeaseDesk"]
