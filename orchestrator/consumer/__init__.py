"""The trainer's side of the daemon: batches are leased to ranks over a Unix socket (``docs/protocol.md``).

From a request to its answer: ``socket`` (connections and frames), ``service`` (the table of methods), ``methods`` (one
file a subject), ``handout`` (who holds which share of a batch). Around it: ``waits`` (who waits for a batch, and what
for), ``starvation`` (what happens when a wait is long), ``writing`` (an answer waits for the disk).
"""

from orchestrator.consumer.socket.connection import Connection
from orchestrator.consumer.socket.server import ConsumerServer

from .handout import Handout, Handouts
from .service import ConsumerService

__all__ = ["Connection", "ConsumerServer", "ConsumerService", "Handout", "Handouts"]
