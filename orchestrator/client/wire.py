"""One connection to the daemon: requests out, answers in.

Invariants:

* The position in the stream survives an interrupted wait: unsent bytes stay in the send queue, a frame half received
  stays in the :class:`FrameReader`. Whoever waits next goes on there, so cancellation and Ctrl-C never tear a frame.
* Answers are matched by id and may come in any order; those that somebody else waits for are parked for them. One task
  reads at a time, for all.
* A request that was given up is forgotten on both sides: ``cancel`` is sent where that helps, a late answer is dropped,
  and a late batch is given back with ``nack``.
* Descriptors that come are in an :class:`Answer` that names them, or closed.
* Limits are checked before memory is taken. Bytes that are not the protocol raise ``FrameError``; that, a broken
  socket or an overdue answer closes the connection for good.
"""

from __future__ import annotations

import itertools
import socket
import time
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, NoReturn

from orchestrator.errors import ConnectionLost, FrameError, OrchestratorError
from orchestrator.frames import encode_frame

from .buffers import BufferPool, Bytes
from .files import close_all, receive
from .remote_errors import error_from_wire
from .stream import Frame, FrameReader
from .waiting import Waiter

__all__ = ["ANSWER_MARGIN_S", "Answer", "BatchRequest", "Wire"]

ANSWER_MARGIN_S: Final = 30.0
"""How much longer than a request's own time its answer may take: a daemon that syncs a slow disk needs seconds."""

STALL_S: Final = 60.0
"""Longest pause within a frame that has begun, and longest wait for room to send: a stopped daemon is noticed by it."""

READ_SLICE_BYTES: Final = 4 << 20
"""Other tasks get a turn after so many bytes (about a millisecond) of one payload."""

CANCELLABLE: Final = frozenset({"get_batch", "pause_generation"})
"""Methods that wait; giving the others up half-way helps nobody."""


class Answer(NamedTuple):
    """The result of a request, and the payload or the descriptors that came with it."""

    result: dict[str, Any]
    payload: Bytes | None = None
    descriptors: tuple[int, ...] = ()


class Wire:
    """See the module's invariants.

    Args:
        sock: connected and non-blocking; belongs to this object from now on.
        waiter: how to wait.
        pool: memory for payloads.
    """

    def __init__(self, sock: socket.socket, waiter: Waiter, pool: BufferPool) -> None:
        self._sock = sock
        self._waiter = waiter
        self._reader = FrameReader(pool)
        self._ids = itertools.count(1)
        self._send_queue = bytearray()
        self._is_flushing = False
        self._is_reading = False
        self._pending: dict[int, str] = {}  # id → method, until the answer came
        self._forgotten: set[int] = set()  # ids of `_pending` that nobody waits for
        self._answers: dict[int, Answer | OrchestratorError] = {}
        self._passed: list[int] = []  # descriptors that came with the frame that is being received
        self.reads_files = False
        self._end: str | None = None

    @property
    def is_open(self) -> bool:
        """Whether requests can still be made."""
        return self._end is None

    @property
    def max_payload(self) -> int:
        """Largest payload, in bytes."""
        return self._reader.max_payload

    def limit_payload(self, max_payload: int) -> None:
        """The daemon announced how large a payload may be, in bytes."""
        self._reader.max_payload = max_payload

    def close(self, why: str = "the client was closed") -> None:
        """End the connection; what is pending fails with ``ConnectionLost``."""
        if self._end is None:
            self._end = why
            self._waiter.closing(self._sock)
            self._sock.close()
            close_all(self._passed)
            for outcome in self._answers.values():
                if isinstance(outcome, Answer):
                    close_all(outcome.descriptors)
            self._passed = []
            self._answers.clear()
            self._waiter.notify()

    def _lose(self, why: str) -> NoReturn:
        self.close(why)
        raise ConnectionLost(f"{why}; unacknowledged leases will be handed out again")

    def _check_open(self) -> None:
        if self._end is not None:
            raise ConnectionLost(f"{self._end}; unacknowledged leases will be handed out again")

    # -- requests ------------------------------------------------------------------------------------------------------

    async def start(self, method: str, params: dict[str, Any]) -> int:
        """Send a request and return its id, without waiting for the answer.

        Raises:
            ConnectionLost: it cannot be sent.
            FrameError: the parameters cannot be written as JSON.
        """
        self._check_open()
        request_id = self._enqueue(method, params)
        try:
            await self._flush()
        except BaseException:
            self.give_up(request_id)
            raise
        return request_id

    def _enqueue(self, method: str, params: dict[str, Any]) -> int:
        request_id = next(self._ids)
        self._send_queue += encode_frame({"id": request_id, "method": method, "params": params})
        self._pending[request_id] = method
        return request_id

    def _post(self, method: str, params: dict[str, Any]) -> None:
        """Enqueue a request whose answer nobody waits for; it leaves with whatever is sent next."""
        self._forgotten.add(self._enqueue(method, params))

    def give_up(self, request_id: int) -> None:
        """Forget a request; if its batch comes nevertheless, it is given back. Sends what the socket takes at once."""
        if self._end is not None:
            return
        outcome = self._answers.pop(request_id, None)
        if isinstance(outcome, Answer):
            close_all(outcome.descriptors)
            self._give_back(outcome.result)
        method = self._pending.get(request_id)
        if method is not None and request_id not in self._forgotten:
            self._forgotten.add(request_id)
            if method in CANCELLABLE:
                self._post("cancel", {"id": request_id})
        self._send_some()

    def give_back(self, result: dict[str, Any]) -> None:
        """A batch that was received is not wanted: have it handed out again."""
        if self._end is None:
            self._give_back(result)
            self._send_some()

    def _give_back(self, result: dict[str, Any]) -> None:
        lease = result.get("lease")
        if isinstance(lease, str):
            self._post("nack", {"lease": lease})

    async def _flush(self) -> None:
        """Send the send queue; leaves it to another task that is at it."""
        if self._is_flushing:
            return
        self._is_flushing = True
        try:
            while not self._send_some():
                await self._waiter.writable(self._sock, time.monotonic() + STALL_S)
                self._check_open()
        except OSError as error:  # TimeoutError is one
            if isinstance(error, ConnectionLost):
                raise
            self._lose(f"the daemon accepts no requests ({str(error) or 'is it stopped?'})")
        finally:
            self._is_flushing = False
        self._check_open()

    def _send_some(self) -> bool:
        """Send as much as the socket takes; whether that was everything."""
        try:
            while self._send_queue:
                del self._send_queue[: self._sock.send(self._send_queue, socket.MSG_NOSIGNAL)]
        except BlockingIOError:
            return False
        except OSError as error:
            self.close(f"the connection to the daemon broke ({error.strerror or error})")
        return True

    # -- answers -------------------------------------------------------------------------------------------------------

    async def answer(self, request_id: int, deadline: float) -> Answer:
        """The answer to a request.

        Raises:
            OrchestratorError: the error that the daemon answered with.
            ConnectionLost: the connection broke, or no answer came before the deadline.
            FrameError: what came is not the protocol; the connection is closed.
        """
        try:
            while request_id not in self._answers:
                self._check_open()
                if self._is_reading:
                    await self._waiter.turn(deadline)
                else:
                    await self._read_for_all(deadline)
        except TimeoutError:
            self._lose("the daemon did not answer in time (is it stopped?)")
        except BaseException:
            self.give_up(request_id)
            raise
        outcome = self._answers.pop(request_id)
        if isinstance(outcome, OrchestratorError):
            raise outcome
        return outcome

    async def _read_for_all(self, deadline: float) -> None:
        """Receive one frame, whoever it is for, and park it."""
        self._is_reading = True
        try:
            frame = await self._receive(deadline)
            self._park(frame)
        except FrameError as error:
            self.close(f"the daemon violated the protocol ({error})")
            raise
        finally:
            self._is_reading = False
            self._waiter.notify()
        if self._send_queue:
            await self._flush()

    async def _receive(self, deadline: float) -> Frame:
        reader, unshared = self._reader, 0
        while True:
            try:
                if self.reads_files and reader.is_between_frames:  # they come with the first byte
                    count, passed = receive(self._sock, reader.target)
                    self._passed += passed
                else:
                    count = self._sock.recv_into(reader.target)
            except BlockingIOError:
                limit = deadline if reader.is_between_frames else time.monotonic() + STALL_S
                await self._waiter.readable(self._sock, limit)
                self._check_open()
                unshared = 0
                continue
            except OSError as error:
                self._lose(f"the connection to the daemon broke ({error.strerror or error})")
            if count == 0:
                self._lose("the daemon closed the connection")
            frame = reader.advance(count)
            if frame is not None:
                return frame
            unshared += count
            if unshared >= READ_SLICE_BYTES:
                await self._waiter.sleep(0)
                self._check_open()
                unshared = 0

    def _park(self, frame: Frame) -> None:
        """Keep an answer for whoever asked.

        Raises:
            FrameError: it is no answer to anything.
            OrchestratorError: the daemon could not read what it got from here.
        """
        header = frame.header
        request_id, outcome = header.get("id"), _outcome(frame)
        descriptors, self._passed = tuple(self._passed), []
        method = self._pending.pop(request_id, None) if type(request_id) is int else None
        is_wanted = method is not None and request_id not in self._forgotten
        if isinstance(outcome, Answer) and is_wanted and method == "get_batch" and "frames" in outcome.result:
            outcome = Answer(outcome.result, outcome.payload, descriptors)
        else:
            close_all(descriptors)
        if request_id is None and isinstance(outcome, OrchestratorError):
            self.close(f"the daemon rejected a frame ({outcome})")
            raise outcome
        if type(request_id) is not int or method is None:
            raise FrameError(f"got an answer to request {request_id!r}, which is not pending")
        if is_wanted:
            self._answers[request_id] = outcome
            return
        self._forgotten.discard(request_id)
        if isinstance(outcome, Answer):
            self._give_back(outcome.result)


def _outcome(frame: Frame) -> Answer | OrchestratorError:
    if "error" in frame.header:
        return error_from_wire(frame.header["error"])
    result = frame.header.get("result")
    if not isinstance(result, dict):
        raise FrameError("an answer needs an object `result` or an object `error`")
    return Answer(result, frame.payload)


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """A ``get_batch`` that was sent and whose batch was not received yet.

    ``id`` on ``wire``, ``sent_at`` a moment of ``time.monotonic()``.
    """

    id: int
    timeout_s: float
    sent_at: float
    wire: Wire
