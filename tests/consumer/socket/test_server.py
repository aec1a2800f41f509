"""The socket at its path, and who may come in: modes, stale and live sockets, users, the bound on connections."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import anyio
import pytest
from structlog.testing import capture_logs

from orchestrator.cli.exit_codes import TAKEN
from orchestrator.client import RolloutClient
from orchestrator.consumer.socket import listener as consumer_listener
from orchestrator.consumer.socket import server
from orchestrator.consumer.socket.listener import SHARED_MODE, Listener, listen
from orchestrator.errors import AlreadyRunning, NotAllowed, StateError, TooManyConnections
from tests.support.consumer_server import Line, Methods, dial, for_ever, serving, until
from tests.support.daemon_process import daemon, write_config
from tests.support.paths import ROOT

NOBODY = 65534


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# -- the path ----------------------------------------------------------------------------------------------------------


async def test_the_mode_is_right_from_the_first_instant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither is the mode changed afterwards, nor the umask, which other threads have too."""

    def never(*_: Any) -> None:
        raise AssertionError("too late")

    mask = os.umask(0)
    try:
        monkeypatch.setattr(Path, "chmod", never)
        monkeypatch.setattr(os, "chmod", never)
        monkeypatch.setattr(os, "umask", never)
        found = await listen(tmp_path / "made" / "for it" / "sock")
        monkeypatch.undo()
    finally:
        os.umask(mask)
    assert mode_of(found.path) == 0o600
    assert mode_of(found.path.parent) == 0o700
    found.close()
    assert not found.path.exists()


async def test_an_umask_that_takes_everything_takes_nothing_that_is_needed(tmp_path: Path) -> None:
    mask = os.umask(0o777)
    try:
        found = await listen(tmp_path / "sock")
    finally:
        os.umask(mask)
    assert mode_of(found.path) == 0o600
    found.close()


async def test_a_shared_socket_can_be_reached_by_others(tmp_path: Path) -> None:
    found = await listen(tmp_path / "made" / "sock", mode=SHARED_MODE)
    assert (mode_of(found.path), mode_of(found.path.parent)) == (0o666, 0o711)
    found.close()


async def test_a_stale_socket_is_replaced_and_a_live_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    first = await listen(path)
    with pytest.raises(AlreadyRunning, match="another daemon listens"):
        await listen(path)
    async with await anyio.connect_unix(path):
        pass
    first.close()


@pytest.mark.parametrize("kind", ["file", "directory", "dangling link"])
async def test_what_is_no_socket_is_left_alone(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "sock"
    {"file": path.touch, "directory": path.mkdir, "dangling link": lambda: path.symlink_to("nowhere")}[kind]()
    with pytest.raises(StateError, match="is not a socket"):
        await listen(path)
    assert path.is_symlink() or path.exists()


async def test_of_many_that_start_at_the_same_time_one_listens(tmp_path: Path) -> None:
    """Without a lock one finds the socket stale, another binds, and the first removes what the other has bound."""
    path = tmp_path / "sock"
    found: list[Listener] = []
    refused: list[AlreadyRunning] = []

    async def start() -> None:
        try:
            found.append(await listen(path))
        except AlreadyRunning as error:
            refused.append(error)

    for _ in range(20):
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(path))
        async with anyio.create_task_group() as tasks:
            for _ in range(6):
                tasks.start_soon(start)
        assert (len(found), len(refused)) == (1, 5)
        async with await anyio.connect_unix(path):
            pass
        found.pop().close()
        refused.clear()
        assert not path.exists()


async def test_a_directory_that_another_process_keeps_locked_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumer_listener, "TURN_DEADLINE_S", 0.1)
    with consumer_listener._turn(tmp_path), pytest.raises(AlreadyRunning, match="lock"):
        await listen(tmp_path / "sock")


async def test_the_socket_of_another_is_not_removed(tmp_path: Path) -> None:
    first = await listen(tmp_path / "sock")
    first.path.unlink()
    second = await listen(tmp_path / "sock")
    first.close()
    assert second.path.exists()
    second.close()


def test_a_daemon_whose_socket_is_taken_ends_with_its_own_exit_code(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "sock"))
        other.listen()
        with daemon(config) as process:
            assert process.wait() == TAKEN
            assert "another daemon listens" in process.stderr


# -- users -------------------------------------------------------------------------------------------------------------


async def test_a_user_who_is_not_allowed_is_told_so(tmp_path: Path) -> None:
    service = Methods()
    with capture_logs() as lines:
        async with serving(tmp_path, service, allow_uids=frozenset({NOBODY})) as path:
            async with dial(path) as line:
                await line.send("echo")
                header = await line.header()
                assert (header["id"], header["error"]["code"]) == (None, "not_allowed")
                assert f"user id {os.getuid()}" in header["error"]["message"]
                assert await line.rest() == b""
            with pytest.raises(NotAllowed, match="allow_uids"):
                await anyio.to_thread.run_sync(RolloutClient(path, connect_timeout_s=20).connect)
            assert not service.connections
    assert any("user id" in entry["event"] for entry in lines if entry["log_level"] == "warning")


OTHER_USER = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from orchestrator.client import RolloutClient
import orchestrator.errors
os.setgid({NOBODY})
os.setuid({NOBODY})
try:
    print(RolloutClient(sys.argv[1]).status()["step"])
except orchestrator.errors.OrchestratorError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to be somebody else")
def test_another_user_comes_in_only_where_the_config_says_so() -> None:
    def answer_to_nobody(folder: Path, **consumer: Any) -> str:
        with daemon(write_config(folder, consumer=consumer)) as process:
            process.connect().close()
            command = [sys.executable, "-c", OTHER_USER, str(process.socket)]
            return subprocess.run(command, capture_output=True, text=True, timeout=40, check=False).stdout

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o711)
        assert "Permission denied" in answer_to_nobody(folder)
        assert answer_to_nobody(folder, allow_uids=[0, NOBODY]) == "0\n"
        assert answer_to_nobody(folder, allow_uids=[0, 12345]).startswith(f"NotAllowed user id {NOBODY} may not")


# -- the bound on connections ------------------------------------------------------------------------------------------


async def test_the_longest_silent_that_never_asked_makes_room_first(tmp_path: Path) -> None:
    service = Methods()
    with capture_logs() as lines:
        async with serving(tmp_path, service, limit=3) as path, AsyncExitStack() as stack:
            asked = await stack.enter_async_context(dial(path))
            assert await asked.ask("echo") == {}
            silent = [await stack.enter_async_context(dial(path)) for _ in range(2)]
            await until(lambda: len(service.connections) == 3)
            for line in silent:
                new = await stack.enter_async_context(dial(path))
                assert await new.ask("echo") == {}
                assert await line.answer() == "too_many_connections"
                assert await line.rest() == b""
            assert await asked.ask("echo", a=1) == {"a": 1}
    assert any("for a new one" in entry["event"] for entry in lines)


async def test_what_begins_a_frame_and_never_asks_is_silent(tmp_path: Path) -> None:
    service = Methods()
    async with serving(tmp_path, service, limit=1) as path, dial(path) as slow, dial(path) as new:
        await slow.stream.send(b"ROL1")
        assert await new.ask("echo") == {}
        assert await slow.answer() == "too_many_connections"


async def test_of_those_that_asked_the_longest_silent_makes_room_and_none_that_is_in_use(tmp_path: Path) -> None:
    service = Methods(wait=for_ever)
    async with serving(tmp_path, service, limit=4) as path, AsyncExitStack() as stack:
        lines: list[Line] = [await stack.enter_async_context(dial(path)) for _ in range(4)]
        holding, waiting, later, earlier = lines
        assert await holding.ask("hold") == {}
        await waiting.send("wait")
        assert await earlier.ask("echo") == {}
        assert await later.ask("echo") == {}
        await until(lambda: any(connection.is_waiting for connection in service.connections.values()))
        for line in (earlier, later):
            new = await stack.enter_async_context(dial(path))
            assert await new.ask("hold") == {}
            assert await line.answer() == "too_many_connections"
        one_too_many = await stack.enter_async_context(dial(path))
        header = await one_too_many.header()
        assert header["error"]["code"] == "too_many_connections"
        assert "max_connections" in header["error"]["message"]
        assert await one_too_many.rest() == b""
        with pytest.raises(TooManyConnections, match="all are in use"):
            await anyio.to_thread.run_sync(RolloutClient(path, connect_timeout_s=0.0).connect)
        for line in (holding, waiting):
            assert await line.ask("echo", 9, a=1) == {"a": 1}
        await holding.stream.aclose()
        late = await stack.enter_async_context(dial(path))
        await until(lambda: len(service.connections) == 4)
        assert await late.ask("echo") == {}


async def test_what_is_beyond_those_that_are_told_why_is_closed_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "MAX_LEAVING", 2)
    service = Methods()
    async with serving(tmp_path, service, limit=1) as path, AsyncExitStack() as stack:
        first = await stack.enter_async_context(dial(path))
        assert await first.ask("hold") == {}
        told = [await stack.enter_async_context(dial(path)) for _ in range(2)]
        assert [await line.answer() for line in told] == ["too_many_connections"] * 2
        more = await stack.enter_async_context(dial(path))
        assert await more.rest() == b""
        assert await first.ask("echo") == {}
