"""Streams of events over real sockets: however an answer is cut, and whatever is wrong with it."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import given, settings

from orchestrator.engines.http import events as events_module
from orchestrator.engines.http import kept as kept_module
from orchestrator.engines.http import origin as origin_module
from orchestrator.engines.http.client import EngineHttp
from orchestrator.engines.http.errors import Failures
from orchestrator.engines.http.events import Connections, EventStream
from orchestrator.errors import EngineError, EngineRejected, EngineUnavailable
from tests.support.engine_pools import DEADLINE_S
from tests.support.raw_http import RawServer, http_answer, raw_server

HOW = ["chunked", "length", "close"]


@pytest.fixture(params=[False, True], ids=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, Any]:
    return ("asyncio", {"use_uvloop": request.param})


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is over because of its time, unless a test says so."""
    monkeypatch.setattr(kept_module, "KEPT_S", 10 * DEADLINE_S)
    monkeypatch.setattr(events_module, "TAIL_S", 10 * DEADLINE_S)


class Event(msgspec.Struct):
    n: int
    text: str = ""


VALUES = [Event(0), Event(1, "Größe"), Event(2, "\n\r data: [DONE] error: "), Event(3, "x" * 300), Event(4, "東京🙂")]


def line(event: Event, *, end: bytes = b"\n") -> bytes:
    return b"data: " + json.dumps(msgspec.to_builtins(event), ensure_ascii=event.n % 2 == 0).encode() + end * 2


BODY = b"".join(map(line, VALUES))
DONE = b"data: [DONE]\n\n"
INTERIM = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"


def client(url: str, **options: Any) -> EngineHttp:
    return EngineHttp(
        **{"name": "e", "url": url, "kind": "test server", "max_streams": 4, "connect_timeout_s": 10 * DEADLINE_S}
        | options
    )


@asynccontextmanager
async def client_of(*pieces: bytes, **options: Any) -> AsyncIterator[tuple[EngineHttp, RawServer]]:
    async with raw_server(*pieces, **options) as server:
        http = client(server.url)
        try:
            yield http, server
        finally:
            await http.aclose()


async def read(http: EngineHttp, enough: Callable[[Event], bool] = lambda _: False) -> list[Event]:
    got: list[Event] = []

    def take(event: Event) -> bool:
        got.append(event)
        return enough(event)

    with anyio.fail_after(DEADLINE_S):
        await http.stream("/p", Event, {"a": [1, 2]}, take)
    return got


async def failure(*pieces: bytes, then: str = "close") -> tuple[EngineError, list[Event]]:
    """How a stream of these pieces fails, and what came before."""
    got: list[Event] = []
    async with client_of(*pieces, then=then) as (http, server):
        with anyio.fail_after(DEADLINE_S), pytest.raises(EngineError) as caught:
            await http.stream("/p", Event, {}, lambda event: bool(got.append(event)))
        await _all_left(server)
        assert not http._streams
    return caught.value, got


async def _all_left(server: RawServer) -> None:
    with anyio.fail_after(DEADLINE_S):
        while server.left < server.connections:  # noqa: ASYNC110 - it comes true in the server, which tells nobody
            await anyio.sleep(0.001)


# -- valid answers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("size", [1, 7, 1 << 20])
async def test_an_answer_that_dribbles_byte_by_byte_is_read(how: str, size: int) -> None:
    answer = INTERIM + http_answer(BODY, how, size=size)
    async with client_of(*(answer[i : i + 1] for i in range(len(answer)))) as (http, server):
        assert await read(http) == VALUES
        assert server.heads[0].startswith(b"POST /p HTTP/1.1\r\n")
        assert json.loads(server.bodies[0]) == {"a": [1, 2]}


class _Transport(asyncio.Transport):
    """Of no connection: what came is given to the stream by the test."""

    def write(self, data: Any) -> None:
        pass

    def close(self) -> None:
        pass

    def abort(self) -> None:
        pass


ANSWERS = [
    before + http_answer(body, how, size=size, headers=headers)
    for before in (b"", INTERIM)
    for body in (
        BODY,
        BODY + DONE + b"data: nonsense\n\n",
        b": a comment\n\nevent: x\nid: 3\n" + BODY.replace(b"\n", b"\r\n"),
    )
    for how, size in (("chunked", 1), ("chunked", 5), ("chunked", 1 << 20), ("length", 1), ("close", 1))
    for headers in (b"", b"Keep-Alive: timeout=5\r\nConnection: keep-alive\r\n")
    if not (how == "close" and headers)
]


async def _nowhere(_: object) -> None:
    raise AssertionError("its connection was never kept")


@given(answer=st.sampled_from(ANSWERS), cuts=st.lists(st.integers(0, 3000), max_size=20))
@settings(max_examples=300, deadline=None)
async def test_any_cut_of_a_valid_answer_gives_the_same_events(answer: bytes, cuts: list[int]) -> None:
    got: list[Event] = []
    ended: list[object] = []
    stream = EventStream(
        Failures("e", "test server"),
        "/p",
        b"",
        msgspec.json.Decoder(Event),
        lambda event: bool(got.append(event)),
        connections=Connections(connect=_nowhere, left=ended.append),
        error_s=5,
    )
    stream.connection_made(_Transport())
    at = 0
    for cut in [*sorted(cuts), len(answer)]:
        if at < (cut := min(cut, len(answer))):
            stream.data_received(answer[at:cut])
            at = cut
    stream.connection_lost(None)
    await stream.ended()
    assert got == VALUES
    assert ended == [stream]


@pytest.mark.parametrize("how", HOW)
async def test_what_follows_enough_or_done_is_not_read(how: str) -> None:
    async with client_of(http_answer(BODY + b"data: nonsense\n\n", how)) as (http, _):
        assert await read(http, lambda event: event.n == 2) == VALUES[:3]
    async with client_of(http_answer(BODY + DONE + b"data: nonsense\n\n", how), then="hang") as (http, server):
        assert await read(http) == VALUES
        await _all_left(server)


async def test_a_stream_is_over_with_its_answer_though_the_server_keeps_the_connection() -> None:
    async with client_of(http_answer(BODY, headers=b"Connection: keep-alive\r\n"), then="hang") as (http, server):
        assert await read(http) == VALUES
        await _all_left(server)


async def test_an_answer_without_events_is_over_at_its_end() -> None:
    async with client_of(http_answer(b": nothing\n\n")) as (http, _):
        assert await read(http) == []


# -- broken answers ---------------------------------------------------------------------------------------------------

WHOLE = http_answer(BODY)
AT = WHOLE.index(b"\r\n\r\n") + 4
CHUNKED_HEAD = WHOLE[:AT]


@pytest.mark.parametrize("how", ["chunked", "length"])
@pytest.mark.parametrize("then", ["close", "reset"])
async def test_an_answer_that_ends_early_is_a_failure_wherever(how: str, then: str) -> None:
    whole = http_answer(BODY, how)
    for end in [*range(0, len(whole) - 1, 41), len(whole) - 2]:
        error, got = await failure(whole[:end], then=then)
        assert type(error) is EngineUnavailable
        assert got == VALUES[: len(got)]


WRONG = {
    "no HTTP": b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
    "another status line": b"HTTP/1.1 two hundred\r\n\r\n",
    "a chunk that is longer than it says": CHUNKED_HEAD + b"4\r\ndata: {}\r\n",
    "a chunk of a size that is no number": CHUNKED_HEAD + b"xyz\r\ndata: {}\r\n",
    "a chunk of a negative size": CHUNKED_HEAD + b"-5\r\ndata: {}\r\n",
    "a chunk that is too large for any": CHUNKED_HEAD + b"f" * 40 + b"\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\ndata",
    "an upgrade": b"HTTP/1.1 101 Switching\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
    "compressed": http_answer(b"\x1f\x8b\x08", headers=b"Content-Encoding: gzip\r\n"),
}


@pytest.mark.parametrize("name", WRONG)
async def test_what_is_no_answer_makes_it_unavailable(name: str) -> None:
    error, got = await failure(WRONG[name], then="hang")
    assert type(error) is EngineUnavailable
    assert "not an answer of a test server" in error.message
    assert got == []


ENDLESS = {
    "headers": (b"HTTP/1.1 200 OK\r\n", b"X-Header: " + b"x" * 1000 + b"\r\n"),
    "a header": (b"HTTP/1.1 200 OK\r\nX-Header: ", b"x" * 1000),
    "a trailer": (CHUNKED_HEAD + b"0\r\nX-Trailer: ", b"x" * 1000),
    "an extension of a chunk": (CHUNKED_HEAD + b"5;x=", b"x" * 1000),
    "interim answers": (b"HTTP/1.1 100 Continue\r\n\r\n",),
    "a line": (http_answer(b"data: ", "close"), b"x" * 1000),
    "a refusal": (http_answer(b"no", "close", status=400), b"o" * 1000),
}


@pytest.mark.parametrize("name", ENDLESS)
async def test_nothing_is_taken_without_end(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events_module, "MAX_LINE_BYTES", 1 << 18)
    error, _ = await failure(*ENDLESS[name], then="repeat")
    assert len(error.message) < 5000


async def test_the_error_of_a_line_tells_what_it_says() -> None:
    error, got = await failure(http_answer(line(VALUES[0]) + b"error: out of memory\n\n"))
    assert (error.message.endswith("/p: out of memory"), got) == (True, VALUES[:1])


@pytest.mark.parametrize("status", [204, 302, 307, 400, 401, 429, 500, 503])
@pytest.mark.parametrize("how", HOW)
async def test_a_refusal_is_read_to_its_end(status: int, how: str) -> None:
    text = b"" if status == 204 else json.dumps({"error": {"message": "no room, " * 30}}).encode()
    answer = b"HTTP/1.1 204 X\r\n\r\n" if status == 204 else http_answer(text, how, status=status, size=9)
    error, _ = await failure(*(answer[i : i + 11] for i in range(0, len(answer), 11)))
    assert type(error) is (EngineRejected if status in (400, 401) else EngineUnavailable)
    assert error.data == {"status": status}
    assert status == 204 or "no room, " * 30 in error.message


async def test_a_redirection_is_not_followed_and_says_where_to() -> None:
    error, _ = await failure(http_answer(b"", status=307, headers=b"Location: http://there:1/p\r\n"))
    assert "redirects to http://there:1/p: use the url" in error.message


@pytest.mark.parametrize("then", ["hang", "close", "reset"])
async def test_a_refusal_whose_text_does_not_end_is_told_with_what_came(then: str) -> None:
    async with client_of(http_answer(b"because, ", "length", status=503)[:-3], then=then) as (_, server):
        http = client(server.url, connect_timeout_s=0.2)
        with anyio.fail_after(DEADLINE_S), pytest.raises(EngineUnavailable, match=r"503.*becau") as caught:
            await http.stream("/p", Event, {}, lambda _: False)
        assert caught.value.data == {"status": 503}
        await http.aclose()


# -- whoever reads ----------------------------------------------------------------------------------------------------


async def test_what_the_reader_raises_ends_the_stream_and_reaches_it() -> None:
    def take(event: Event) -> bool:
        if event.n == 1:
            raise ZeroDivisionError("of ours")
        assert event.n == 0, "called after it raised"
        return False

    async with client_of(WHOLE, then="hang") as (http, server):
        with anyio.fail_after(DEADLINE_S), pytest.raises(ZeroDivisionError, match="of ours"):
            await http.stream("/p", Event, {}, take)
        await _all_left(server)


async def test_a_cancelled_wait_can_be_begun_again_and_loses_nothing() -> None:
    got: list[Event] = []
    head, rest = WHOLE[: len(WHOLE) // 2], WHOLE[len(WHOLE) // 2 :]
    go_on = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(head)
        await go_on.wait()
        writer.write(rest)
        await writer.drain()

    async with raw_server(answer=answer) as server:
        http = client(server.url)
        with anyio.CancelScope() as scope:
            with await http.begin_stream(
                "/p", Event, {}, lambda event: bool((got.append(event), scope.cancel())[0])
            ) as stream:
                try:
                    await stream.ended()
                except anyio.get_cancelled_exc_class():
                    before = len(got)
                    with anyio.CancelScope(shield=True), anyio.fail_after(DEADLINE_S):
                        go_on.set()
                        await stream.ended()
                    raise
        await http.aclose()
    assert scope.cancelled_caught
    assert 0 < before < len(got)
    assert got == VALUES


async def test_a_stream_that_is_over_is_held_by_nothing() -> None:
    """In particular by no cycle: the collector runs seldom."""
    gc.collect()
    gc.disable()
    try:
        async with client_of(WHOLE) as (http, _):
            with await http.begin_stream("/p", Event, {}, lambda _: False) as stream:
                await stream.ended()
            del stream
            with anyio.fail_after(DEADLINE_S):  # the transport lets go of it when it has closed
                while any(isinstance(found, EventStream) for found in gc.get_objects()):  # noqa: ASYNC110
                    await anyio.sleep(0.001)
    finally:
        gc.enable()


# -- connections ------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def full_server() -> AsyncIterator[str]:
    """Its queue of connections is full: a connect is not answered."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        port = listener.getsockname()[1]
        waiting = []
        for _ in range(4):
            one = socket.socket()
            one.setblocking(False)
            one.connect_ex(("127.0.0.1", port))
            waiting.append(one)
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            for one in waiting:
                one.close()


async def test_a_connect_that_is_not_answered_ends_in_time() -> None:
    async with full_server() as url:
        http = client(url, connect_timeout_s=0.2)
        with (
            anyio.fail_after(DEADLINE_S),
            pytest.raises(EngineUnavailable, match=r"cannot connect: no answer within 0\.2 s"),
        ):
            await http.stream("/p", Event, {}, lambda _: False)
        await http.aclose()


async def test_closing_ends_what_is_just_connecting() -> None:
    async with full_server() as url:
        http = client(url, connect_timeout_s=10 * DEADLINE_S)

        async def ask() -> None:
            with pytest.raises(EngineUnavailable, match="closed"):
                await http.stream("/p", Event, {}, lambda _: False)

        with anyio.fail_after(DEADLINE_S):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(ask)
                await anyio.wait_all_tasks_blocked()
                await http.aclose()
        with pytest.raises(EngineUnavailable, match="closed"):
            await http.stream("/p", Event, {}, lambda _: False)


async def test_all_addresses_of_a_name_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    async def addresses(self: Any, host: str, port: int, **_: Any) -> list[Any]:
        asked.append(host)
        return [(socket.AF_INET, 1, 6, "", (address, port)) for address in ("127.0.0.2", "127.0.0.1")]

    monkeypatch.setattr(type(asyncio.get_running_loop()), "getaddrinfo", addresses, raising=False)
    async with raw_server(WHOLE) as server:
        http = client(server.url.replace("127.0.0.1", "a.name"))
        assert await read(http) == await read(http) == VALUES
        assert b"\r\nHost: a.name:" in server.heads[0]
        await http.aclose()
    assert asked == ["a.name"], "remembered"


async def test_a_name_is_asked_for_again_after_a_while_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    async def addresses(self: Any, host: str, port: int, **_: Any) -> list[Any]:
        asked.append(host)
        await asyncio.sleep(0)
        return [(socket.AF_INET, 1, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(type(asyncio.get_running_loop()), "getaddrinfo", addresses, raising=False)
    monkeypatch.setattr(origin_module, "RESOLVED_S", -1.0)
    async with raw_server(WHOLE) as server:
        http = client(server.url.replace("127.0.0.1", "a.name"))
        assert await read(http) == VALUES
        async with anyio.create_task_group() as tasks:
            for _ in range(5):
                tasks.start_soon(read, http)
        await http.aclose()
    assert len(asked) == 2


async def test_a_name_that_nobody_knows_makes_it_unavailable() -> None:
    http = client("http://no-such-name.invalid:80")
    with pytest.raises(EngineUnavailable, match="unknown host name"):
        await http.stream("/p", Event, {}, lambda _: False)
    await http.aclose()


async def test_a_path_of_the_url_is_before_all_others_and_the_key_goes_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", "secret")
    async with raw_server(WHOLE) as server:
        http = client(server.url + "/base/", api_key_env="A_KEY")
        assert await read(http) == VALUES
        await http.aclose()
    assert server.heads[0].startswith(b"POST /base/p HTTP/1.1\r\n")
    assert b"\r\nAuthorization: Bearer secret\r\n" in server.heads[0]


# -- connections that are kept ----------------------------------------------------------------------------------------


@asynccontextmanager
async def keeping(*pieces: bytes, keeps: int = 9, then: str = "close") -> AsyncIterator[tuple[EngineHttp, RawServer]]:
    async with raw_server(*pieces, keeps=keeps, then=then) as server:
        http = client(server.url, keeps_connections=True)
        try:
            yield http, server
        finally:
            await http.aclose()
            await _all_left(server)


async def _kept(http: EngineHttp, count: int) -> None:
    """Return when so many connections are kept."""
    kept = http._origin.kept
    assert kept is not None
    with anyio.fail_after(DEADLINE_S):
        while len(kept) != count:  # noqa: ASYNC110 - it comes true when the rest of an answer has come
            await anyio.sleep(0.001)


@pytest.mark.parametrize("how", ["chunked", "length"])
@pytest.mark.parametrize("body", [BODY, BODY + DONE])
async def test_streams_in_a_row_use_one_connection(how: str, body: bytes) -> None:
    whole = http_answer(body, how, size=100)
    async with keeping(whole[:-20], whole[-20:-5], whole[-5:]) as (http, server):
        for _ in range(5):
            assert await read(http) == VALUES
            await _kept(http, 1)
        assert (server.connections, len(server.heads)) == (1, 5)
        assert b"\r\nConnection: keep-alive\r\n" in server.heads[0]


async def test_the_rest_of_an_answer_is_waited_for_after_its_stream_is_over() -> None:
    go_on = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(2):
            await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(2)
            writer.write(WHOLE[:-5])
            await go_on.wait()
            writer.write(WHOLE[-5:])
        await reader.read()

    async with raw_server(answer=answer) as server:
        http = client(server.url, keeps_connections=True)
        with anyio.fail_after(DEADLINE_S):
            await http.stream("/p", Event, {}, lambda event: event.n == 4)
            await _kept(http, 0)
            go_on.set()
            await _kept(http, 1)
            await http.stream("/p", Event, {}, lambda event: event.n == 4)
            await _kept(http, 1)
        await http.aclose()


NOT_KEPT = {
    "its end is that of the connection": http_answer(BODY, "close"),
    "the server said so": http_answer(BODY, headers=b"Connection: close\r\n"),
    "an old version": WHOLE.replace(b"HTTP/1.1", b"HTTP/1.0"),
    "bytes after the end": WHOLE + b"HTTP/1.1 200 OK\r\n",
    "the rest does not come": WHOLE[:-3],
    "the rest does not end": WHOLE[:-2] + b"X-Trailer: " + b"x" * (1 << 19),
}


@pytest.mark.parametrize("name", NOT_KEPT)
async def test_a_connection_that_was_not_left_clean_is_closed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events_module, "TAIL_S", 0.05)
    async with keeping(NOT_KEPT[name], keeps=0, then="close" if "connection" in name else "hang") as (http, server):
        assert await read(http, lambda event: event.n == 4) == VALUES
        await _all_left(server)
        await _kept(http, 0)


async def test_a_refusal_or_an_error_of_the_reader_closes_the_connection() -> None:
    async with keeping(http_answer(b"no", status=400)) as (http, server):
        with pytest.raises(EngineRejected):
            await read(http)
        await _all_left(server)
    async with keeping(WHOLE) as (http, server):
        with pytest.raises(ZeroDivisionError):
            await read(http, lambda _: bool(1 // 0))
        await _all_left(server)
        await _kept(http, 0)


@pytest.mark.parametrize("then", ["close", "reset"])
async def test_a_kept_connection_that_ends_without_a_byte_is_replaced(then: str) -> None:
    """The server closed it when the request was on its way already."""
    async with keeping(WHOLE, keeps=1, then=then) as (http, server):
        for _ in range(6):
            assert await read(http) == VALUES
            await _kept(http, 1)
        assert server.connections == 3
        assert len(server.heads) == 8, "six, two of which were sent twice"


async def test_a_new_connection_that_ends_without_a_byte_is_a_failure() -> None:
    async with keeping(keeps=0) as (http, server):
        with pytest.raises(EngineUnavailable, match="disconnected without an answer"):
            await read(http)
        assert len(server.heads) == 1


async def test_a_kept_connection_that_ends_within_the_answer_is_a_failure() -> None:
    answers = [WHOLE, WHOLE[:20]]

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while answers:
            await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(2)
            writer.write(answers.pop(0))

    async with raw_server(answer=answer) as server:
        http = client(server.url, keeps_connections=True)
        with anyio.fail_after(DEADLINE_S):
            await http.stream("/p", Event, {}, lambda event: event.n == 4)
            await _kept(http, 1)
            with pytest.raises(EngineUnavailable, match="/p"):
                await http.stream("/p", Event, {}, lambda event: event.n == 4)
        assert server.connections == 1, "it was sent again"
        await http.aclose()


async def test_a_connection_is_kept_for_a_while_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_module, "KEPT_S", 0.05)
    async with keeping(WHOLE) as (http, server):
        assert await read(http) == VALUES
        await _kept(http, 0)
        await _all_left(server)


async def test_a_connection_that_the_server_ends_is_not_kept() -> None:
    async with raw_server(WHOLE, keeps=0, then="close") as server:
        http = client(server.url, keeps_connections=True)
        assert await read(http) == await read(http) == VALUES
        await _kept(http, 0)
        await http.aclose()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For 127.0.0.1, by itself."""
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=test"]
    more = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", f"{path}", "-out", f"{path}.crt"]
    subprocess.run(made + more, check=True, capture_output=True)
    path.write_text(path.read_text() + Path(f"{path}.crt").read_text())
    return path


async def test_https_needs_a_certificate_that_is_trusted(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    async with raw_server(WHOLE, tls=context) as server:
        stranger = client(server.url)
        with anyio.fail_after(DEADLINE_S), pytest.raises(EngineUnavailable, match="certificate was not accepted"):
            await stranger.stream("/p", Event, {}, lambda _: False)
        await stranger.aclose()
        monkeypatch.setenv("SSL_CERT_FILE", f"{certificate}.crt")
        trusted = client(server.url)
        assert await read(trusted) == VALUES
        await trusted.aclose()


async def test_a_connection_of_https_is_kept_too(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    monkeypatch.setenv("SSL_CERT_FILE", f"{certificate}.crt")
    async with raw_server(WHOLE, keeps=9, tls=context) as server:
        http = client(server.url, keeps_connections=True)
        for _ in range(3):
            assert await read(http) == VALUES
            await _kept(http, 1)
        assert (server.connections, len(server.heads)) == (1, 3)
        await http.aclose()
