"""The blocking client against the stub: methods, leases, broken connections, odd answers."""

from __future__ import annotations

import inspect
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from orchestrator import errors
from orchestrator.client import AsyncRolloutClient, RolloutClient
from orchestrator.client.remote_errors import ERROR_TYPES, error_from_wire
from orchestrator.errors import (
    BatchTimeout,
    ConnectionLost,
    FrameError,
    LeaseUnknown,
    OrchestratorError,
    RankInUse,
    RemoteError,
    RunFinished,
    VersionWentBack,
)
from tests.support.consumer_stub import StubConnection, frame, stub_daemon

CAUSE = {"sentence": "step 0: easy lacks 3 of 4 groups (no engine is up)", "kind": "engines", "sources": []}


def answer_with(method: str, code: str, data: dict[str, Any] | None = None, *, times: int = 10**9) -> Any:
    left = [times]

    def script(connection: StubConnection, request_id: int, asked: str, _: dict[str, Any]) -> bool:
        if asked != method or not left[0]:
            return False
        left[0] -= 1
        connection.error(request_id, code, f"no: {code}", data)
        return True

    return script


# -- what is loaded ---------------------------------------------------------------------------------------------------


def test_importing_the_client_loads_neither_an_event_loop_nor_the_daemon() -> None:
    code = """
import sys
import orchestrator.client
ours = {name for name in sys.modules if name.partition(".")[0] == "orchestrator"}
allowed = {"orchestrator", "orchestrator.errors", "orchestrator.records", "orchestrator.frames"}
print(sorted(name for name in ours - allowed if not name.startswith("orchestrator.client")))
loops = {"anyio", "asyncio", "msgspec", "structlog", "aiofiles", "uvloop", "pydantic"}
print(sorted({name.partition(".")[0] for name in sys.modules} & loops))
orchestrator.client.AsyncRolloutClient
print("anyio" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.split("\n")[:3] == ["[]", "[]", "True"]


def test_the_client_works_without_anything_but_numpy(tmp_path: Path) -> None:
    code = """
import sys
for name in ("orjson", "anyio", "msgspec", "structlog", "uvloop", "aiofiles", "pydantic"):
    sys.modules[name] = None
from orchestrator.client import RolloutClient
with RolloutClient(sys.argv[1]) as client:
    print([batch.step for batch in client.batches()])
"""
    with stub_daemon(tmp_path, 2) as daemon:
        command = [sys.executable, "-c", code, str(daemon.path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert (done.stdout, done.stderr) == ("[0, 1]\n", "")


def test_both_clients_have_the_same_methods() -> None:
    def methods(kind: type) -> dict[str, Any]:
        names = [name for name in dir(kind) if not name.startswith("_") and callable(getattr(kind, name))]
        return {name: list(inspect.signature(getattr(kind, name)).parameters.values()) for name in names}

    assert methods(RolloutClient) == methods(AsyncRolloutClient)
    assert inspect.signature(RolloutClient).parameters == inspect.signature(AsyncRolloutClient).parameters


# -- where to connect -------------------------------------------------------------------------------------------------


def test_the_socket_is_found_by_argument_then_environment_then_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ORCHESTRATOR_SOCKET", raising=False)
    (tmp_path / "run").mkdir()
    nobody = RolloutClient(connect_timeout_s=0)
    with pytest.raises(ConnectionLost, match=r"run/orchestrator\.sock.*orchestrator run"):
        nobody.status()
    with stub_daemon(tmp_path, 1) as daemon:
        (tmp_path / "run" / "orchestrator.sock").symlink_to(daemon.path)
        with RolloutClient():
            pass
        monkeypatch.setenv("ORCHESTRATOR_SOCKET", str(daemon.path))
        (tmp_path / "run" / "orchestrator.sock").unlink()
        with RolloutClient():
            pass
        monkeypatch.setenv("ORCHESTRATOR_SOCKET", "nowhere")
        with RolloutClient(daemon.path):
            pass


def test_a_daemon_that_comes_later_is_waited_for(tmp_path: Path) -> None:
    with stub_daemon(tmp_path, 1) as daemon:
        daemon.stop()
        started = []

        def start(_: float) -> None:
            if not started:
                daemon.start()
                started.append(True)

        client = RolloutClient(daemon.path)
        client._core._waiter.sleep = _then(start)  # type: ignore[method-assign]
        with client:
            assert client.get_batch().step == 0
    assert started


def _then(act: Any) -> Any:
    async def sleep(seconds: float) -> None:
        act(seconds)

    return sleep


def test_a_path_that_cannot_be_a_socket_is_not_waited_for(tmp_path: Path) -> None:
    with pytest.raises(ConnectionLost, match="too long"):
        RolloutClient(tmp_path / ("x" * 200), connect_timeout_s=3600).connect()
    with pytest.raises(ConnectionLost, match="Not a directory"):
        RolloutClient("/dev/null/x", connect_timeout_s=3600).connect()


def test_hello_names_the_client_and_takes_over_only_once(tmp_path: Path) -> None:
    with stub_daemon(tmp_path, 1) as daemon, RolloutClient(daemon.path, client="mine", rank=3, takeover=True) as client:
        assert client.hello(takeover=False)["params"] == {
            "client": "mine",
            "protocol": 1,
            "rank": 3,
            "takeover": False,
        }
        client.close()
        client.connect()
        params = [params for method, params in daemon.seen if method == "hello"]
        assert params[0] == {"client": "mine", "protocol": 1, "rank": 3, "takeover": True}
        assert params[2] == {"client": "mine", "protocol": 1}


# -- methods and errors -----------------------------------------------------------------------------------------------


def test_every_method_sends_what_the_protocol_says(tmp_path: Path) -> None:
    with stub_daemon(tmp_path, 1) as daemon, RolloutClient(daemon.path, rank=1, world_size=4) as client:
        calls: list[tuple[Any, str, dict[str, Any]]] = [
            (lambda: client.nack("lease-0", discard=True), "nack", {"lease": "lease-0", "discard": True}),
            (lambda: client.set_policy_version(3), "set_policy_version", {"version": 3, "mode": "keep"}),
            (lambda: client.pause_generation("finish", 5), "pause_generation", {"mode": "finish", "timeout_s": 5}),
            (client.continue_generation, "continue_generation", {}),
            (client.status, "status", {}),
            (lambda: client.set_weight("a", None), "set_weight", {"source": "a", "weight": None}),
            (lambda: client.pause("a"), "pause", {"source": "a"}),
            (lambda: client.resume("a"), "resume", {"source": "a"}),
            (client.reload, "reload", {}),
            (lambda: client.remove_source("a"), "sources", {"action": "remove", "name": "a"}),
            (lambda: client.restore_source("a"), "sources", {"action": "restore", "name": "a"}),
            (
                lambda: client.add_source({"name": "a"}, 0.5),
                "sources",
                {"action": "add", "source": {"name": "a"}, "weight": 0.5, "cap": None},
            ),
            (client.drain, "drain", {}),
            (lambda: client.save("7"), "save", {"name": "7"}),
            (lambda: client.load("7"), "load", {"name": "7"}),
            (lambda: client.get_batch(2), "get_batch", {"timeout_s": 2, "rank": 1, "world_size": 4, "by_file": True}),
            (lambda: client.save("8"), "save", {"name": "8", "trained_through": 0}),
            (lambda: client.save("9", 5), "save", {"name": "9", "trained_through": 5}),
            (lambda: client.ack("lease-0"), "ack", {"lease": "lease-0"}),
            (lambda: client.save("10"), "save", {"name": "10"}),
        ]
        for call, method, params in calls:
            got = call()
            assert daemon.seen[-1] == (method, params)
            if isinstance(got, dict):
                assert got == {"echo": params}


def test_every_code_of_the_house_has_its_type() -> None:
    for code, kind in ERROR_TYPES.items():
        error = error_from_wire({"code": code, "message": "what to do", "data": {"a": 1}})
        assert type(error) is kind
        assert (str(error), error.data) == ("what to do", {"a": 1})


def test_only_errors_that_never_travel_have_no_type() -> None:
    ours = {kind for name in errors.__all__ if issubclass(kind := getattr(errors, name), Exception)}
    engine = {kind for kind in ours if issubclass(kind, errors.EngineError | errors.RewardError)}
    of_components = {errors.ConfigError, errors.GenerationFailed, errors.TokenizerError, errors.ArchiveError}
    of_groups = {errors.FilterError, errors.PromptUnavailable}
    never = {*of_components, *of_groups, errors.ConnectionLost, errors.RemoteError}
    assert ours - set(ERROR_TYPES.values()) == engine | never


def test_an_error_of_the_daemon_is_raised_as_its_type(tmp_path: Path) -> None:
    with (
        stub_daemon(tmp_path, 1, script=answer_with("ack", "lease_expired")) as daemon,
        RolloutClient(daemon.path) as c,
    ):
        with pytest.raises(LeaseUnknown, match="no: lease_expired"):
            c.ack("x")
        daemon.script = answer_with("set_policy_version", "version_went_back", {"in_force": 4})
        with pytest.raises(VersionWentBack) as caught:
            c.set_policy_version(3)
        assert caught.value.data == {"in_force": 4}
        daemon.script = answer_with("status", "from_the_future", {"x": 1})
        with pytest.raises(RemoteError) as unknown:
            c.status()
        assert (unknown.value.remote_code, unknown.value.data) == ("from_the_future", {"x": 1})
        daemon.script = None
        assert c.get_batch().step == 0  # an error ends nothing


def test_a_timeout_carries_the_cause(tmp_path: Path) -> None:
    script = answer_with("get_batch", "timeout", {"cause": CAUSE})
    with stub_daemon(tmp_path, 1, script=script) as daemon, RolloutClient(daemon.path) as client:
        with pytest.raises(BatchTimeout) as caught:
            client.get_batch(0.1)
        assert caught.value.data["cause"] == CAUSE


# -- the stream -------------------------------------------------------------------------------------------------------


def test_answers_may_come_in_any_order(tmp_path: Path) -> None:
    held: list[int] = []

    def reversed_order(connection: StubConnection, request_id: int, method: str, params: dict[str, Any]) -> bool:
        if method == "get_batch":
            held.append(request_id)
            return True
        if method == "status":
            connection.sock.sendall(
                b"".join(connection.batch_answer(held[step], step) for step in (1, 0))
                + frame({"id": request_id, "result": {"fine": True}})
            )
            return True
        return False

    with stub_daemon(tmp_path, 2, script=reversed_order) as daemon, RolloutClient(daemon.path) as client:
        first, second = client.request_batch(), client.request_batch()
        assert client.status() == {"fine": True}
        assert [client.receive_batch(first).step, client.receive_batch(second).step] == [0, 1]


def test_a_frame_may_come_in_pieces_of_any_size(tmp_path: Path) -> None:
    def drop_by_drop(connection: StubConnection, request_id: int, method: str, params: dict[str, Any]) -> bool:
        if method != "get_batch":
            return False
        data = connection.batch_answer(request_id, 0)
        for i in range(len(data)):
            connection.sock.sendall(data[i : i + 1])
        return True

    with stub_daemon(tmp_path, 1, script=drop_by_drop) as daemon, RolloutClient(daemon.path) as client:
        assert client.get_batch().rewards.tolist() == [0, 1, 1, 1]


def test_a_connection_that_breaks_at_any_byte_of_a_batch_is_lost_and_the_batch_comes_again(tmp_path: Path) -> None:
    length = [0]

    def cut(connection: StubConnection, request_id: int, method: str, params: dict[str, Any]) -> bool:
        if method == "get_batch" and length[0] is not None:
            connection.sock.sendall(connection.batch_answer(request_id, 0)[: length[0]])
            connection.cut()
        return False

    with stub_daemon(tmp_path, 1, script=cut) as daemon, RolloutClient(daemon.path) as client:
        size = len(daemon.connections[0].batch_answer(2, 0))
        for length[0] in [*range(40), *range(40, size, 97), size - 1]:
            with pytest.raises(ConnectionLost, match="handed out again"):
                client.get_batch()
        daemon.script = None
        assert client.get_batch().lease == "lease-0"


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"ROL1" + b"\xff" * 12,
        b"ROL1" + (0).to_bytes(4, "little") + (2**33).to_bytes(8, "little"),
        b"ROL1" + (2).to_bytes(4, "little") + (0).to_bytes(8, "little") + b"[]",
        frame({"id": 999, "result": {}}),
        frame({"id": "1", "result": {}}),
        frame({"id": 2}),
        frame({"id": 2, "result": []}),
        frame({"id": 2, "error": "no"}),
        frame({"id": 2, "error": {"code": "x", "message": 1}}),
    ],
)
def test_what_is_not_the_protocol_is_a_frame_error_and_ends_the_connection(tmp_path: Path, data: bytes) -> None:
    def babble(connection: StubConnection, _: int, method: str, __: dict[str, Any]) -> bool:
        if method == "status":
            connection.sock.sendall(data)
        return method == "status"

    with stub_daemon(tmp_path, 1, script=babble) as daemon, RolloutClient(daemon.path) as client:
        with pytest.raises(FrameError):
            client.status()
        daemon.wait_until(lambda: not daemon.connections)
        assert client.get_batch().step == 0  # over a new one


def test_a_payload_above_the_announced_limit_is_refused_before_it_is_received(tmp_path: Path) -> None:
    def modest(connection: StubConnection, request_id: int, method: str, _: dict[str, Any]) -> bool:
        if method == "hello":
            connection.result(request_id, {"max_payload": 100})
        return method == "hello"

    with (
        stub_daemon(tmp_path, 1, script=modest) as daemon,
        RolloutClient(daemon.path) as client,
        pytest.raises(FrameError, match="at most 100"),
    ):
        client.get_batch()


def test_a_frame_that_the_daemon_refused_is_told(tmp_path: Path) -> None:
    def refuse(connection: StubConnection, _: int, method: str, __: dict[str, Any]) -> bool:
        if method == "status":
            connection.error(None, "bad_frame", "too long")
            connection.cut()
        return False

    with (
        stub_daemon(tmp_path, 1, script=refuse) as daemon,
        RolloutClient(daemon.path) as client,
        pytest.raises(FrameError, match="too long"),
    ):
        client.status()


@pytest.mark.parametrize("groups", [1, 3])
def test_another_number_of_groups_than_announced_is_a_frame_error(tmp_path: Path, groups: int) -> None:
    with stub_daemon(tmp_path, 1) as daemon, RolloutClient(daemon.path) as client:
        daemon.groups = groups
        with pytest.raises(FrameError, match=f"{groups} groups were announced, but 2 arrived"):
            client.get_batch()


def test_a_silent_daemon_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("core", "connecting"):
        monkeypatch.setattr(f"orchestrator.client.{module}.ANSWER_MARGIN_S", 0.05)
    silent = lambda connection, request_id, method, params: method in ("status", "get_batch")  # noqa: E731
    with stub_daemon(tmp_path, 1, script=silent) as daemon, RolloutClient(daemon.path) as client:
        with pytest.raises(ConnectionLost, match="in time"):
            client.status()
        with pytest.raises(ConnectionLost, match="in time"):
            client.get_batch(timeout_s=0.01)


def test_a_daemon_that_stops_within_a_payload_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.client.wire.STALL_S", 0.05)

    def half(connection: StubConnection, request_id: int, method: str, _: dict[str, Any]) -> bool:
        if method == "get_batch":
            connection.sock.sendall(connection.batch_answer(request_id, 0)[:-8])
        return method == "get_batch"

    with (
        stub_daemon(tmp_path, 1, script=half) as daemon,
        RolloutClient(daemon.path) as client,
        pytest.raises(ConnectionLost, match="in time"),
    ):
        client.get_batch(timeout_s=3600)


def test_interrupted_in_the_middle_of_a_batch_the_connection_goes_on(tmp_path: Path) -> None:
    """Ctrl-C while a batch is received: the rest of its frame is read later, and the batch is given back."""

    def half(connection: StubConnection, request_id: int, method: str, _: dict[str, Any]) -> bool:
        if method == "get_batch":
            rest.append(connection.batch_answer(request_id, 0))
            connection.sock.sendall(rest[0][:500])
        if method == "cancel" and rest:
            connection.sock.sendall(rest.pop()[500:])
        return method == "get_batch"

    rest: list[bytes] = []
    with stub_daemon(tmp_path, 1, script=half) as daemon, RolloutClient(daemon.path) as client:
        waiter = client._core._waiter
        patient = waiter.readable

        async def interrupted(sock: socket.socket, deadline: float) -> None:
            if rest and not client._core._wire._reader.is_between_frames:
                raise KeyboardInterrupt
            await patient(sock, deadline)

        waiter.readable = interrupted  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            client.get_batch()
        waiter.readable = patient  # type: ignore[method-assign]
        assert client.status() == {"echo": {}}
        client.status()  # what is posted aside has been sent by now
        daemon.wait_until(lambda: daemon.given_back == [0])
        daemon.script = None
        assert client.get_batch().lease == "lease-0"
        assert [method for method, _ in daemon.seen].count("hello") == 1


def test_cancel_gives_a_request_up_or_its_batch_back(tmp_path: Path) -> None:
    with stub_daemon(tmp_path, 3) as daemon, RolloutClient(daemon.path) as client:
        for _ in range(2):
            client.get_batch()
        waiting = client.request_batch()  # a third lease: waits
        client.cancel(waiting)
        client.ack("lease-0")
        assert daemon.handed_out == [0, 1]
        came = client.request_batch()
        daemon.wait_until(lambda: daemon.handed_out == [0, 1, 2])
        client.cancel(came)
        client.status()
        client.status()
        daemon.wait_until(lambda: daemon.given_back == [2])
        assert client.get_batch().step == 2


def test_a_batch_that_was_parked_and_is_given_up_is_given_back(tmp_path: Path) -> None:
    with stub_daemon(tmp_path, 2) as daemon, RolloutClient(daemon.path) as client:
        first, second = client.request_batch(), client.request_batch()
        assert client.receive_batch(second).step == 1  # the answer to the first came before it
        client.cancel(first)
        daemon.wait_until(lambda: daemon.given_back == [0])
        assert client.get_batch().step == 0


def test_two_threads_in_one_client_are_told(tmp_path: Path) -> None:
    with stub_daemon(tmp_path, 1) as daemon, RolloutClient(daemon.path) as client:
        client._core._wire._is_reading = True  # as another thread would leave it
        with pytest.raises(RuntimeError, match="one client per thread"):
            client.status()


# -- the loop ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefetch", [False, True])
def test_the_loop_acknowledges_each_batch_when_the_next_is_asked_for(tmp_path: Path, prefetch: bool) -> None:
    with stub_daemon(tmp_path, 4) as daemon, RolloutClient(daemon.path) as client:
        steps = []
        for batch in client.batches(prefetch=prefetch):
            steps.append(batch.step)
            assert daemon.acked == steps[:-1]
            if prefetch and batch.step < 3:  # the next one is formed while this one is in hand
                daemon.wait_until(lambda step=batch.step: step + 1 in daemon.handed_out)
        assert steps == daemon.acked == [0, 1, 2, 3]


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("leave", ["raise", "break"])
def test_a_batch_whose_loop_was_left_comes_again_in_order(tmp_path: Path, prefetch: bool, leave: str) -> None:
    with stub_daemon(tmp_path, 3) as daemon, RolloutClient(daemon.path) as client:
        try:
            for batch in client.batches(prefetch=prefetch):
                if batch.step == 1:
                    if leave == "raise":
                        raise ValueError
                    break
        except ValueError:
            pass
        assert daemon.acked == [0]
        assert [batch.step for batch in client.batches(prefetch=prefetch)] == [1, 2]
        assert daemon.acked == [0, 1, 2]


def test_what_the_loop_body_settled_itself_is_left_alone(tmp_path: Path) -> None:
    with stub_daemon(tmp_path, 3) as daemon, RolloutClient(daemon.path) as client:
        for batch in client.batches():
            if batch.step == 0:
                client.ack(batch.lease)
            if batch.step == 1 and not daemon.given_back:
                client.nack(batch.lease)
        assert [params for method, params in daemon.seen if method == "ack"] == [
            {"lease": f"lease-{step}"} for step in range(3)
        ]
        assert daemon.handed_out == [0, 1, 1, 2]


def test_a_client_that_closes_within_the_loop_leaves_its_batch(tmp_path: Path) -> None:
    with stub_daemon(tmp_path, 2) as daemon:
        with RolloutClient(daemon.path) as client:
            assert next(client.batches()).step == 0
        daemon.wait_until(lambda: not daemon.connections)
        with RolloutClient(daemon.path) as client:
            assert [batch.step for batch in client.batches()] == [0, 1]


@pytest.mark.parametrize("prefetch", [False, True])
def test_a_restart_in_the_loop_body_costs_nothing(tmp_path: Path, prefetch: bool) -> None:
    """The batch in hand is acknowledged over the new connection before another is asked for."""
    causes: list[dict[str, Any]] = []
    with stub_daemon(tmp_path, 4) as daemon, RolloutClient(daemon.path) as client:
        steps = []
        for batch in client.batches(prefetch=prefetch, on_wait=causes.append):
            steps.append(batch.step)
            if batch.step in (1, 2):
                daemon.stop()
                daemon.start()
        assert steps == daemon.acked == [0, 1, 2, 3]
        assert [cause["kind"] for cause in causes] == ["connection", "connection"]


@pytest.mark.parametrize("prefetch", [False, True])
def test_a_connection_that_breaks_within_a_payload_costs_nothing(tmp_path: Path, prefetch: bool) -> None:
    cuts: list[int] = []

    def cut(connection: StubConnection, request_id: int, method: str, _: dict[str, Any]) -> bool:
        if method == "get_batch" and len(cuts) < 3 and len(daemon.handed_out) > len(cuts):
            cuts.append(request_id)
            step = len(daemon.acked)
            connection.sock.sendall(connection.batch_answer(request_id, step)[: 100 * len(cuts)])
            connection.cut()
        return False

    with stub_daemon(tmp_path, 5, script=cut) as daemon, RolloutClient(daemon.path) as client:
        assert [batch.step for batch in client.batches(prefetch=prefetch)] == [0, 1, 2, 3, 4]
        assert daemon.acked == [0, 1, 2, 3, 4]
    assert len(cuts) == 3


def test_an_acknowledgement_whose_answer_was_lost_is_sent_again(tmp_path: Path) -> None:
    cuts: list[int] = []

    def cut(connection: StubConnection, request_id: int, method: str, params: dict[str, Any]) -> bool:
        if method == "ack" and not cuts:
            cuts.append(request_id)
            daemon.acked.append(0)
            connection.cut()
        return False

    with stub_daemon(tmp_path, 2, script=cut) as daemon, RolloutClient(daemon.path) as client:
        assert [batch.step for batch in client.batches()] == [0, 1]
        assert [params["lease"] for method, params in daemon.seen if method == "ack"] == [
            "lease-0",
            "lease-0",
            "lease-1",
        ]


def test_a_daemon_that_does_not_come_back_is_given_up(tmp_path: Path) -> None:
    with stub_daemon(tmp_path, 3) as daemon, RolloutClient(daemon.path) as client:
        loop = client.batches(reconnect_s=0.1)
        next(loop)
        daemon.stop()
        with pytest.raises(ConnectionLost):
            next(loop)
        daemon.start()


def test_a_draining_daemon_is_waited_for(tmp_path: Path) -> None:
    script = answer_with("get_batch", "shutting_down", times=2)
    with stub_daemon(tmp_path, 1, script=script) as daemon, RolloutClient(daemon.path) as client:
        causes: list[dict[str, Any]] = []
        assert [batch.step for batch in client.batches(on_wait=causes.append)] == [0]
        assert [cause["sentence"] for cause in causes] == ["no: shutting_down"] * 2


def test_a_rank_in_use_is_an_error_unless_it_may_be_our_own(tmp_path: Path) -> None:
    data = {"pid": os.getpid()}
    with stub_daemon(tmp_path, 2, script=answer_with("get_batch", "rank_in_use", data)) as daemon:
        with RolloutClient(daemon.path) as client, pytest.raises(RankInUse):
            next(client.batches())
        daemon.script = None
        with RolloutClient(daemon.path) as client:
            loop = client.batches()
            next(loop)
            daemon.script = answer_with("get_batch", "rank_in_use", data, times=1)
            daemon.drop_connections()
            assert next(loop).step == 1


def test_the_loop_waits_on_and_says_why(tmp_path: Path) -> None:
    script = answer_with("get_batch", "timeout", {"cause": CAUSE}, times=3)
    with stub_daemon(tmp_path, 1, script=script) as daemon, RolloutClient(daemon.path) as client:
        causes: list[dict[str, Any]] = []
        assert [batch.step for batch in client.batches(on_wait=causes.append)] == [0]
        assert causes == [CAUSE] * 3


def test_the_loop_gives_up_after_its_timeout(tmp_path: Path) -> None:
    script = answer_with("get_batch", "timeout", {"cause": CAUSE})
    with stub_daemon(tmp_path, 1, script=script) as daemon, RolloutClient(daemon.path) as client:
        began = time.monotonic()
        with pytest.raises(BatchTimeout):
            next(client.batches(timeout_s=0.05))
        assert time.monotonic() >= began + 0.05
        asked = [params["timeout_s"] for method, params in daemon.seen if method == "get_batch"]
        assert all(0 <= seconds <= 0.05 for seconds in asked)


def test_a_wait_that_passed_while_the_trainer_worked_is_not_reported(tmp_path: Path) -> None:
    with stub_daemon(tmp_path, 2) as daemon, RolloutClient(daemon.path) as client:
        causes: list[dict[str, Any]] = []
        loop = client.batches(prefetch=True, on_wait=causes.append)
        daemon.script = lambda c, i, m, p: answer(c, i, m, p) if daemon.handed_out else False
        answer = answer_with("get_batch", "timeout", {"cause": CAUSE}, times=1)
        assert [batch.step for batch in loop] == [0, 1]
        assert causes == []


def test_other_errors_end_the_loop(tmp_path: Path) -> None:
    with stub_daemon(tmp_path, 2) as daemon, RolloutClient(daemon.path) as client:
        loop = client.batches()
        next(loop)
        daemon.script = answer_with("ack", "lease_expired")
        with pytest.raises(LeaseUnknown):
            next(loop)
        daemon.script = answer_with("get_batch", "internal")
        with pytest.raises(OrchestratorError):
            next(client.batches())


def test_the_end_of_the_run_ends_the_loop_and_stops_get_batch(tmp_path: Path) -> None:
    with stub_daemon(tmp_path, 1) as daemon, RolloutClient(daemon.path) as client:
        assert len(list(client.batches())) == 1
        assert list(client.batches()) == []
        with pytest.raises(RunFinished):
            client.get_batch()
        assert daemon.acked == [0]
