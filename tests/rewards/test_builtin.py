"""Rewards: a finite number or an error, within a deadline, whatever the function does to its process."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from array import array
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.concurrency.processes import process
from orchestrator.concurrency.processes.messages import PREFIX
from orchestrator.errors import DottedPathError, RewardError, RewardTimeout
from orchestrator.records import NO_VERSION, Prompt, Sample, SampleStatus
from orchestrator.rewards import Reward, RewardResult
from orchestrator.rewards.wire import decode_call, encode_call
from tests.support.specs import build_reward

HERE = Path(__file__).parent
FUNCTIONS = "tests.support.reward_functions"


@pytest.fixture
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    """uvloop, as in the daemon; see ``BOTH_LOOPS``."""
    return "asyncio", {"use_uvloop": getattr(request, "param", True)}


BOTH_LOOPS = pytest.mark.parametrize("anyio_backend", [False, True], ids=["asyncio", "uvloop"], indirect=True)
"""They start and watch processes in entirely different ways."""


def sample_of(text: str = "42") -> Sample:
    return Sample(index=0, text=text, status=SampleStatus.COMPLETED)


def prompt_of(label: Any = None) -> Prompt:
    return Prompt("easy", 3, 0, "6*7?", label)


@asynccontextmanager
async def reward_of(name: str, **options: Any) -> AsyncIterator[Reward]:
    reward = build_reward(name if name in ("exact_match", "contains") else f"{FUNCTIONS}.{name}", **options)
    try:
        yield reward
    finally:
        await reward.aclose()


async def score(reward: Reward, sample: Sample, prompt: Prompt) -> RewardResult:
    (result,) = await reward.score([sample], prompt)
    return result


async def ended(pid: int) -> None:
    """Return when that process has ended."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        with anyio.fail_after(20):
            await anyio.wait_readable(descriptor)
    finally:
        os.close(descriptor)


class Fifo:
    """A named pipe whose end here is open for reading and writing, so that nobody blocks for want of the other."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK)
        weakref.finalize(self, os.close, self.descriptor)

    async def read(self, size: int) -> bytes:
        with anyio.fail_after(30):
            await anyio.wait_readable(self.descriptor)
        return os.read(self.descriptor, size)


# -- built-ins --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "label", "value"),
    [
        ("exact_match", " 42\n", "42 ", 1.0),
        ("exact_match", "42", 42, 1.0),
        ("exact_match", "= 42", "42", 0.0),
        ("exact_match", "b", ["a", "b"], 1.0),
        ("exact_match", "c", ["a", "b"], 0.0),
        ("exact_match", "", "", 1.0),
        ("contains", "it is 42.", 42, 1.0),
        ("contains", "it is 4", "42", 0.0),
        ("contains", "it is b", ["a", " b"], 1.0),
    ],
)
async def test_built_ins(name: str, text: str, label: Any, value: float) -> None:
    async with reward_of(name) as reward:
        assert await score(reward, sample_of(text), prompt_of(label)) == RewardResult(value)
        assert reward.statistics().scored == 1


@pytest.mark.parametrize("name", ["exact_match", "contains"])
@pytest.mark.parametrize("label", [None, [], [None], {"a": 1}])
async def test_a_prompt_without_a_label_is_an_error_and_not_zero(name: str, label: Any) -> None:
    async with reward_of(name) as reward:
        with pytest.raises(RewardError, match="label of prompt 3 of source easy"):
            await score(reward, sample_of(), prompt_of(label))
        assert reward.statistics().failed == 1


async def test_everything_contains_an_empty_label() -> None:
    async with reward_of("contains") as reward:
        with pytest.raises(RewardError, match="is empty"):
            await score(reward, sample_of(), prompt_of(" "))


# -- what can be built ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (f"{FUNCTIONS}.absent", "absent"),
        ("no_such_module.score", "no_such_module"),
        (f"{FUNCTIONS}.not_callable", "not_callable"),
    ],
)
def test_what_is_no_reward(spec: str, said: str) -> None:
    with pytest.raises(DottedPathError, match=said):
        build_reward(spec)


@pytest.mark.parametrize(
    "options", [{"timeout_s": 0}, {"timeout_s": float("inf")}, {"concurrency": 0}, {"key": "score"}]
)
def test_parameters_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        build_reward("exact_match", **options)


async def test_a_function_of_another_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "reward_of_a_user.py").write_text("def score(sample, prompt):\n    return 0.25\n")
    reward = build_reward("reward_of_a_user.score", directory=tmp_path)
    assert await score(reward, sample_of(), prompt_of()) == RewardResult(0.25)
    await reward.aclose()


async def test_a_worker_looks_where_the_daemon_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    (tmp_path / "reward_on_the_path.py").write_text("def score(sample, prompt):\n    return 0.75\n")
    reward = build_reward("reward_on_the_path.score")
    assert await score(reward, sample_of(), prompt_of()) == RewardResult(0.75)
    await reward.aclose()


async def test_a_function_that_can_no_longer_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    module = tmp_path / "reward_that_goes.py"
    module.write_text("def score(sample, prompt):\n    return 0.25\n")
    reward = build_reward("reward_that_goes.score", directory=tmp_path)
    module.unlink()
    with pytest.raises(RewardError, match=r"its worker process cannot import it: .*reward_that_goes"):
        await score(reward, sample_of(), prompt_of())
    assert reward.statistics().extra["processes"] == 0


# -- what a function may return ---------------------------------------------------------------------------------------

KINDS = pytest.mark.parametrize("function", ["returns", "returns_async"])


@KINDS
async def test_numbers_and_dictionaries(function: str) -> None:
    good = {
        "true": (1.0, None),
        "float32": (0.5, None),
        "int64": (3.0, None),
        "fraction": (0.25, None),
        "dict": (0.5, {"score": 0.5, "why": "close"}),
        "dict of numpy": (0.5, {"score": 0.5, "parts": [0, 1, 2], "7": None}),
    }
    async with reward_of(function, key="score") as reward:
        for label, (value, detail) in good.items():
            assert await score(reward, sample_of(), prompt_of(label)) == RewardResult(value, detail)
        assert reward.statistics().scored == len(good)


@KINDS
async def test_everything_else_is_an_error_that_names_the_function(function: str) -> None:
    bad = {
        "none": "returned None of type NoneType",
        "text": "returned '1.0' of type str",
        "list": "of type list",
        "complex": "of type complex",
        "decimal": "of type Decimal",
        "nan": "returned nan; expected a finite number",
        "infinite": "returned -inf",
        "numpy nan": "returned nan",
        "dict with text": "under 'score' '0.5' of type str",
        "dict with nan": "under 'score' nan",
        "dict with set": "cannot be written as JSON",
        "large dict": "bytes of JSON; at most",
        "empty dict": "without the key 'score'; its keys: none",
    }
    async with reward_of(function, key="score") as reward:
        for label, said in bad.items():
            with pytest.raises(RewardError, match=f"{FUNCTIONS}.{function}: .*{said}"):
                await score(reward, sample_of(), prompt_of(label))
        statistics = reward.statistics()
        assert (statistics.scored, statistics.failed) == (0, len(bad))
        assert statistics.last_error is not None
        assert "without the key" in statistics.last_error
        assert statistics.extra.get("processes", 1) == 1  # a wrong answer costs no process


@KINDS
@pytest.mark.parametrize(("key", "said"), [("reward", "without the key 'reward'"), (None, "set `key`")])
async def test_a_dictionary_needs_a_key_that_it_has(function: str, key: str | None, said: str) -> None:
    async with reward_of(function, key=key) as reward:
        with pytest.raises(RewardError, match=f"{said}.*'score', 'why'"):
            await score(reward, sample_of(), prompt_of("dict"))


# -- what a function may raise ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["raises", "raises_async"])
async def test_an_exception_is_an_error_with_its_words(function: str) -> None:
    said = {
        "plain": r"KeyError: 'no such answer' \(.*reward_functions.py:\d+\)",
        "timeout": "TimeoutError: of the function's own",
        "strange": "StrangeError",
        "long": "ValueError: xxx",
    }
    async with reward_of(function) as reward:
        for label, words in said.items():
            with pytest.raises(RewardError, match=f"{FUNCTIONS}.{function}: it raised .*{words}") as caught:
                await score(reward, sample_of(), prompt_of(label))
            assert type(caught.value) is RewardError
            assert len(caught.value.message) < 3000
        with pytest.raises(RewardError, match=r"SystemExit: 3|exited with code 3"):
            await score(reward, sample_of(), prompt_of("exit"))
        assert (await score(reward, sample_of(), prompt_of())).value == 1.0
        assert (reward.statistics().failed, reward.statistics().scored) == (5, 1)


# -- asynchronous functions -------------------------------------------------------------------------------------------


async def test_an_asynchronous_function_runs_in_the_loop() -> None:
    async with reward_of("async_instance") as reward:
        assert (await score(reward, sample_of(), prompt_of())).value == os.getpid()


async def test_an_asynchronous_function_has_a_deadline() -> None:
    async with reward_of("hangs_async", timeout_s=0.05) as reward:
        with pytest.raises(RewardTimeout, match=r"hangs_async: no answer within 0.05 s"):
            await score(reward, sample_of(), prompt_of("hang"))
        assert (await score(reward, sample_of(), prompt_of())).value == 1.0
        assert (reward.statistics().timed_out, reward.statistics().failed) == (1, 0)


async def test_asynchronous_calls_wait_for_their_turn() -> None:
    async with reward_of("hangs_async", concurrency=3) as reward, anyio.create_task_group() as group:
        for _ in range(8):
            group.start_soon(score, reward, sample_of(), prompt_of("hang"))
        await anyio.wait_all_tasks_blocked()
        statistics = reward.statistics()
        assert (statistics.running, statistics.extra["waiting"]) == (3, 5)
        assert statistics.extra["oldest_running_s"] >= 0
        group.cancel_scope.cancel()
    statistics = reward.statistics()
    assert (statistics.running, statistics.failed, statistics.extra["oldest_running_s"]) == (0, 0, None)


# -- worker processes -------------------------------------------------------------------------------------------------


@BOTH_LOOPS
async def test_a_synchronous_function_runs_in_one_process_again_and_again() -> None:
    async with reward_of("process_id") as reward:
        pids = {(await score(reward, sample_of(), prompt_of())).value for _ in range(5)}
        assert len(pids) == 1
        assert os.getpid() not in pids
        assert reward.statistics().extra == {
            "oldest_running_s": None,
            "waiting": 0,
            "processes": 1,
            "processes_started": 1,
        }
    assert reward.statistics().extra["processes"] == 0
    with pytest.raises(ProcessLookupError):
        os.kill(int(pids.pop()), 0)
    with pytest.raises(RewardError, match="it was closed"):
        await score(reward, sample_of(), prompt_of())


@pytest.mark.parametrize("function", ["instance", "alarm"])
async def test_callable_objects_and_signals(function: str) -> None:
    async with reward_of(function) as reward:
        assert (await score(reward, sample_of(), prompt_of())).value > 0


@BOTH_LOOPS
async def test_a_hanging_call_is_killed_at_its_deadline_and_the_next_succeeds(tmp_path: Path) -> None:
    fifo = Fifo(tmp_path / "fifo")
    async with reward_of("hangs", timeout_s=1.0) as reward:
        assert (await score(reward, sample_of(), prompt_of())).value == 1.0
        with pytest.raises(RewardTimeout, match="hangs: no answer within 1 s; its worker process was killed"):
            await score(reward, sample_of(), prompt_of(str(tmp_path / "fifo")))
        assert (await score(reward, sample_of(), prompt_of())).value == 1.0
        statistics = reward.statistics()
        assert (statistics.scored, statistics.timed_out, statistics.failed) == (2, 1, 0)
        assert (statistics.extra["processes"], statistics.extra["processes_started"]) == (1, 2)
        for pid in (await fifo.read(100)).split():
            await ended(int(pid))


async def test_the_time_of_an_import_is_not_part_of_the_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "reward_of_slow_import.py").write_text(
        "import sys, time\n"
        "if 'pytest' not in sys.modules:\n"
        "    time.sleep(0.8)\n"
        "def score(sample, prompt):\n    return 0.25\n"
    )
    reward = build_reward("reward_of_slow_import.score", directory=tmp_path, timeout_s=0.5)
    assert (await score(reward, sample_of(), prompt_of())).value == 0.25
    await reward.aclose()


@BOTH_LOOPS
async def test_a_process_that_does_not_become_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "START_TIMEOUT_S", 0)
    async with reward_of("length") as reward:
        with pytest.raises(RewardTimeout, match="was not ready within 0 s"):
            await score(reward, sample_of(), prompt_of())
        assert reward.statistics().extra["processes"] == 0
        assert reward.statistics().timed_out == 1


@BOTH_LOOPS
async def test_a_process_that_cannot_be_started_is_an_error_of_that_call(monkeypatch: pytest.MonkeyPatch) -> None:
    async with reward_of("length") as reward:
        with monkeypatch.context() as short:
            short.setattr(sys, "executable", "/nowhere/python")  # as where there are too many processes already
            with pytest.raises(RewardError, match=r"length: cannot start its worker process: .*No such file"):
                await score(reward, sample_of(), prompt_of())
        assert (await score(reward, sample_of("abc"), prompt_of())).value == 3.0


@BOTH_LOOPS
@pytest.mark.parametrize("end", ["cancel", "aclose"])
async def test_a_call_that_is_given_up_leaves_nothing_behind(tmp_path: Path, end: str) -> None:
    fifo = Fifo(tmp_path / "fifo")
    errors = []

    async def one(reward: Reward) -> None:
        try:
            await score(reward, sample_of(), prompt_of(str(tmp_path / "fifo")))
        except RewardError as error:
            errors.append(str(error))

    async with reward_of("hangs") as reward:
        async with anyio.create_task_group() as group:
            group.start_soon(one, reward)
            pids = [int(pid) for pid in (await fifo.read(100)).split()]
            assert reward.statistics().running == 1
            if end == "cancel":
                group.cancel_scope.cancel()
            else:
                await reward.aclose()
        assert len(pids) == 2
        for pid in pids:  # the function's own child as well
            await ended(pid)
        assert len(errors) == (end == "aclose")
        statistics = reward.statistics()
        assert (statistics.running, statistics.extra["processes"]) == (0, 0)


@BOTH_LOOPS
@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("garbage", "something that is not an answer"),
        ("huge", "something that is not an answer"),
        ("exit", "exited with code 7"),
        ("signal", "signal 15 .Terminated"),
        ("segfault", "signal 11 .Segmentation fault"),
    ],
)
async def test_a_process_that_cannot_go_on_is_an_error_that_says_how(how: str, said: str) -> None:
    async with reward_of("crashes") as reward:
        with pytest.raises(RewardError, match=f"reward {FUNCTIONS}.crashes: .*{said}"):
            await score(reward, sample_of(), prompt_of(how))
        assert (await score(reward, sample_of(), prompt_of())).value == 1.0
        statistics = reward.statistics()
        assert (statistics.scored, statistics.failed, statistics.extra["processes_started"]) == (1, 1, 2)


@BOTH_LOOPS
async def test_what_a_function_prints_does_no_harm(capfd: pytest.CaptureFixture[str]) -> None:
    async with reward_of("prints") as reward:
        assert [(await score(reward, sample_of(), prompt_of())).value for _ in range(2)] == [0.0, 0.0]
    out, err = capfd.readouterr()
    assert "y" * 1000 not in out
    assert err.count("y" * 100_000) == err.count("x" * 100_000) == err.count("z" * 1000) == 2


@BOTH_LOOPS
async def test_programs_that_a_function_starts_do_not_inherit_our_pipes() -> None:
    async with reward_of("descriptors", key="score") as reward:
        detail = (await score(reward, sample_of(), prompt_of())).detail
    assert detail is not None
    assert detail["open"] == []


@BOTH_LOOPS
async def test_not_more_calls_than_concurrency_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "inside").write_text("0")
    entered, gate = Fifo(tmp_path / "entered"), Fifo(tmp_path / "gate")
    most = []

    async def one(reward: Reward) -> None:
        most.append((await score(reward, sample_of(), prompt_of(str(tmp_path)))).value)

    async with reward_of("meets", concurrency=3) as reward:
        async with anyio.create_task_group() as group:
            for _ in range(8):
                group.start_soon(one, reward)
            for _ in range(3):  # so many are inside at the same time: nobody has been let out yet
                await entered.read(1)
            assert reward.statistics().running == 3
            for _ in range(5):
                os.write(gate.descriptor, b".")
                await entered.read(1)
            os.write(gate.descriptor, b"...")
        assert max(most) == 3
        assert reward.statistics().extra["processes_started"] == 3


async def test_two_hundred_calls_at_once() -> None:
    values = {}

    async def one(reward: Reward, size: int) -> None:
        values[size] = (await score(reward, sample_of("x" * size), prompt_of())).value

    async with reward_of("length", concurrency=2) as reward:
        async with anyio.create_task_group() as group:
            for size in range(200):
                group.start_soon(one, reward, size)
        assert values == {size: float(size) for size in range(200)}
        assert reward.statistics().scored == 200
        assert reward.statistics().extra["processes_started"] == 2


async def test_the_function_sees_the_whole_sample_and_prompt() -> None:
    sample, prompt = Sample(7), Prompt("chat", 1, 2, [{"role": "user", "content": "é"}], [1], {"x": None}, [1, 2])
    sample.extend(range(3), [-0.5, -0.25, 0.0], 4)
    sample.extend([9], [0.0], NO_VERSION)
    sample.text, sample.status, sample.finish_reason = "a\u2028b", SampleStatus.TRUNCATED, "length"
    sample.loss_mask, sample.metadata = b"\1\1\1\0", {"data_source": "chat"}
    async with reward_of("whole", key="score") as reward:
        detail = (await score(reward, sample, prompt)).detail
    assert detail is not None
    assert detail["sample"] == repr(sample)
    assert detail["prompt"] == repr(prompt).replace("tokens=[1, 2]", "tokens=array('i', [1, 2])")


@BOTH_LOOPS
async def test_a_megabyte_of_text() -> None:
    async with reward_of("length") as reward:
        assert (await score(reward, sample_of("x" * 3_000_000), prompt_of())).value == 3_000_000


async def test_what_cannot_be_sent_is_an_error() -> None:
    async with reward_of("length") as reward:
        with pytest.raises(RewardError, match="length: it cannot be called"):
            await score(reward, sample_of(), prompt_of({1, 2}))


def test_a_worker_process_does_not_carry_the_daemons_libraries() -> None:
    """There may be dozens of them, each with its own memory and its own start."""
    program = "import sys, orchestrator.rewards.service; print(*sys.modules)"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert not {"aiohttp", "pydantic", "structlog", "uvloop"} & set(said.stdout.split())


def test_workers_end_with_the_daemon(tmp_path: Path) -> None:
    """The daemon is killed: an idle worker, one in the middle of a call, and what that has started, all end."""
    fifo = Fifo(tmp_path / "fifo")
    program = (
        "import os, anyio\n"
        "from orchestrator.records import Prompt, Sample\n"
        "from tests.support.specs import build_reward\n"
        "async def main():\n"
        f"    idle, busy = build_reward('{FUNCTIONS}.process_id'), build_reward('{FUNCTIONS}.hangs')\n"
        "    print((await idle.score([Sample(0)], Prompt('a', 0, 0, 'b')))[0].value, flush=True)\n"
        f"    await busy.score([Sample(0)], Prompt('a', 0, 0, 'b', {str(tmp_path / 'fifo')!r}))\n"
        "anyio.run(main)\n"
    )
    daemon = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=HERE.parent)

    async def check() -> None:
        busy = [int(pid) for pid in (await fifo.read(100)).split()]
        assert daemon.stdout is not None
        daemon.stdout.readline()  # printed when the functions' module is imported
        idle = int(float(daemon.stdout.readline()))
        daemon.kill()
        for pid in (idle, *busy):
            await ended(pid)

    try:
        anyio.run(check)
    finally:
        daemon.kill()
        daemon.communicate()


# -- the wire ---------------------------------------------------------------------------------------------------------


@given(
    tokens=st.lists(st.integers(-(2**31), 2**31 - 1), max_size=5),
    has_logprobs=st.booleans(),
    has_mask=st.booleans(),
    text=st.text(max_size=10),
    prompt_tokens=st.none() | st.lists(st.integers(0, 2**31 - 1), max_size=4),
)
def test_calls_arrive_as_they_were_sent(
    tokens: list[int], has_logprobs: bool, has_mask: bool, text: str, prompt_tokens: list[int] | None
) -> None:
    sample = sample_of(text)
    sample.extend(tokens, [0.5] * len(tokens) if has_logprobs else None, 3)
    sample.loss_mask = bytes(len(tokens)) if has_mask else None
    prompt = Prompt("s", 1, 2, None, text, {"t": text}, None if prompt_tokens is None else array("i", prompt_tokens))
    message = encode_call([sample], prompt)
    header_bytes, data_bytes = PREFIX.unpack_from(message)
    assert len(message) == PREFIX.size + header_bytes + data_bytes
    header = orjson.loads(message[PREFIX.size : PREFIX.size + header_bytes])
    assert decode_call(header, message[PREFIX.size + header_bytes :]) == ([sample], prompt)
