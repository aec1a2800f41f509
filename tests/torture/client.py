"""For the torture scripts: a plain client, and a conversation that may be left after every message."""

from __future__ import annotations

import socket
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from orchestrator.frames import PREFIX_BYTES, encode_frame, parse_header, parse_prefix
from tests.torture.model import Model, Violation, must

ANSWER_DEADLINE_S = 30.0


class Gone(Exception):
    """The connection broke."""


class Refused(Exception):
    """The daemon answered with an error."""

    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(f"{error['code']}: {error['message']}")
        self.code = error["code"]


class Talk:
    """A client that may stop between any two messages."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(ANSWER_DEADLINE_S)
        try:
            self._socket.connect(str(path))
        except OSError:
            self._socket.close()
            raise
        self._next = 0

    def send(self, method: str, **params: Any) -> None:
        self._next += 1
        try:
            self._socket.sendall(encode_frame({"id": self._next, "method": method, "params": params}))
        except OSError as error:
            raise Gone from error

    def receive(self) -> tuple[dict[str, Any], bytes]:
        prefix = parse_prefix(self._exactly(PREFIX_BYTES))
        header = parse_header(self._exactly(prefix.header_bytes))
        payload = self._exactly(prefix.payload_bytes)
        if "error" in header:
            raise Refused(header["error"])
        return header["result"], payload

    def ask(self, method: str, **params: Any) -> tuple[dict[str, Any], bytes]:
        self.send(method, **params)
        return self.receive()

    def _exactly(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            try:
                block = self._socket.recv(size - len(data))
            except TimeoutError:
                raise Violation(f"no answer within {ANSWER_DEADLINE_S:g} s") from None
            except OSError as error:
                raise Gone from error
            if not block:
                raise Gone
            data += block
        return bytes(data)

    def close(self) -> None:
        self._socket.close()


def steps(talk: Talk, model: Model, batches: int = 12, *, checkpoints: bool = False) -> Iterator[str]:
    """A conversation that may be left after every message, sent or received; says what has just happened.

    It takes and acknowledges batches, gives one back, holds one for long, changes what can be changed at run time. With
    ``checkpoints`` it saves one and goes back to it a while later: all leases end by that.
    """

    def ask(method: str, **params: Any) -> Generator[str, None, tuple[dict[str, Any], bytes]]:
        talk.send(method, **params)
        yield f"{method} sent"
        return talk.receive()

    def acknowledge(lease: str) -> Iterator[str]:
        model.asked.add(lease)
        model.ever_asked.add(lease)
        yield from ask("ack", lease=lease)
        model.acked.add(lease)
        model.trained[lease] = model.leased[lease]
        yield "ack answered"

    def go_back(name: str) -> Iterator[str]:
        model.loading = name
        yield from ask("load", name=name)
        model.load(name)
        yield "load answered"
        yield from ask("set_policy_version", version=model.version, mode="keep")

    held: list[str] = []
    name = f"torture-{model.checks}"
    problems = (yield from ask("verify_checkpoints"))[0]["problems"]
    must(not any(problems.values()), f"checkpoints are damaged: {problems}")
    hello, _ = yield from ask("hello", client="torture", protocol=1)
    must(model.version <= hello["policy_version"] <= model.asked_version, f"version {hello['policy_version']} came up")
    model.version = hello["policy_version"]
    # engines have to be told after a restart what they hold
    yield from ask("set_policy_version", version=model.version, mode="keep")
    for i in range(batches):
        lease = model.see_batch(*(yield from ask("get_batch", timeout_s=20)))
        held.append(lease)
        yield "get_batch answered"
        if i % 3 == 1:
            model.see_status((yield from ask("status"))[0])
            yield "status answered"
        if len(held) == 2:  # the oldest lease stays, and with it old segments
            yield from acknowledge(held.pop())
        if i == batches // 3:
            yield from ask("nack", lease=held[0])
            again = model.see_batch(*(yield from ask("get_batch", timeout_s=20)))
            must(again == held[0], "what was given back comes first")
        if i == batches // 2:
            model.asked_version = model.version + 1
            yield from ask("set_policy_version", version=model.asked_version, mode="keep")
            model.version = model.asked_version
            yield "set_policy_version answered"
        if checkpoints and i == batches - 3:
            yield from ask("save", name=name)
            model.save(name, held)
            yield "save answered"
    if checkpoints:
        yield from go_back(name)
        held = [model.see_batch(*(yield from ask("get_batch", timeout_s=20)))]
        yield "get_batch answered"
    for lease in held:
        yield from acknowledge(lease)
    model.see_status((yield from ask("status"))[0])
    yield "status answered"


def converse(talk: Talk, model: Model, batches: int = 12, *, checkpoints: bool = False) -> None:
    """The whole conversation."""
    for _ in steps(talk, model, batches, checkpoints=checkpoints):
        pass


def load_again(talk: Talk, model: Model, name: str) -> None:
    """Whether a load whose client went came to its end is not known; after another one it is."""
    while True:
        try:
            talk.ask("load", name=name)
        except Refused as error:
            must(error.code == "bad_request", f"a checkpoint cannot be loaded any more: {error}")  # it is under way
            time.sleep(0.01)
        else:
            model.load(name)
            return
