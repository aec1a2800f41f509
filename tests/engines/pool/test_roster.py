"""Engines that are late, that fail and recover, that come and go, and whose parameters change, while samples go on.

Each engine here stamps its tokens: the log-probability says which version of the parameters produced it. So every
sample can be checked, token by token, against what the engines know.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.abc
import anyio.lowlevel
import pytest

from orchestrator.engines import (
    EngineInfo,
    EnginePool,
    GenerationEnd,
    GenerationRequest,
    KnownParameters,
    ParameterUpdate,
    SamplingParams,
    ScriptedEngine,
    TokenSink,
)
from orchestrator.engines.pool.generation import MAX_MOVES
from orchestrator.engines.pool.health import MAX_IN_A_ROW
from orchestrator.errors import BadRequest, EngineError, EngineRejected, EngineUnavailable
from orchestrator.records import Sample
from tests.support.engine_pools import running_pool
from tests.support.engine_time import JUMPING

PROMPT = list(b"a prompt of 24 bytes ...")
N = 40
SAMPLING = SamplingParams(max_new_tokens=N)


@pytest.fixture
def anyio_backend() -> tuple[str, Any]:
    """Waits cost nothing: no test here has a socket, a file or a thread."""
    return ("asyncio", dict(JUMPING))


class Stamped(ScriptedEngine):
    """Its log-probabilities are ``-version``; ``process`` stands for its process; with ``reports`` it tells."""

    def __init__(self, name: str, *, version: int = 0, reports: bool = False, **options: Any) -> None:
        super().__init__(**{"name": name, "chunk": 2, "max_in_flight": 4} | options)
        self.version = version
        self.reports = reports
        self.process: str | None = "1"
        self.probe_s = 0.0
        self.update_s = 1.0
        self.update_error: type[EngineError] | None = None
        self.updates: list[ParameterUpdate] = []
        self.is_loading = False
        self.is_away = False
        self.fails = False
        self.is_free = anyio.Event()
        self.is_free.set()
        self.now = 0
        self.most = 0
        self.served = 0

    async def probe(self) -> EngineInfo:
        if self.is_away:
            raise EngineUnavailable(self.name, "away")
        now = EngineInfo(model="stamped", instance=self.process, policy_version=self.version if self.reports else None)
        await anyio.sleep(self.probe_s)
        return now

    async def generate(self, request: GenerationRequest, sink: TokenSink) -> GenerationEnd:
        def stamp(tokens: Sequence[int], logprobs: Sequence[float] | None, text: str) -> None:
            sink(tokens, [-float(self.version)] * len(tokens), text)

        self.now += 1
        self.most = max(self.most, self.now)
        self.served += 1
        try:
            if self.is_away or self.fails:
                raise EngineUnavailable(self.name, "broken")
            return await super().generate(request, stamp)
        finally:
            self.now -= 1

    async def _wait(self, seconds: float) -> None:
        await super()._wait(seconds)
        await self.is_free.wait()

    async def update_parameters(self, update: ParameterUpdate) -> None:
        self.updates.append(update)
        assert update.keeps_requests or self.now == 0, "the pool has made it quiet"
        assert not self.is_loading, "one after the other"
        self.is_free, self.is_loading = anyio.Event(), True
        try:
            await anyio.sleep(self.update_s)
        finally:
            self.is_free.set()
            self.is_loading = False
        if self.is_away:
            raise EngineUnavailable(self.name, "away")
        if self.update_error is not None:
            raise self.update_error(self.name, "cannot")
        self.version = update.version


def assert_stamped(samples: Sequence[Sample]) -> None:
    """The versions of every sample are those that its engines held."""
    for sample in samples:
        assert sample.logprobs is not None
        said = [version for version, count in sample.versions for _ in range(count)]
        assert said == [-int(logprob) for logprob in sample.logprobs]
        assert len(said) == N


class Load:
    """Samples that are generated one after the other in each of some lanes, until it is stopped."""

    def __init__(self, pool: EnginePool, lanes: int) -> None:
        self.pool = pool
        self.lanes = lanes
        self.done: list[Sample] = []
        self.is_over = False
        self._next = 0
        self._grown = anyio.Event()

    async def run(self) -> None:
        async with anyio.create_task_group() as tasks:
            for _ in range(self.lanes):
                tasks.start_soon(self._lane)

    async def _lane(self) -> None:
        while not self.is_over:
            sample = Sample(index=self._next)
            self._next += 1
            await self.pool.generate(sample, PROMPT, SAMPLING)
            self.done.append(sample)
            self._grown.set()
            self._grown = anyio.Event()

    async def until(self, more: int) -> None:
        wanted = len(self.done) + more
        while len(self.done) < wanted:
            await self._grown.wait()


@asynccontextmanager
async def loaded(*engines: Stamped, lanes: int = 8, **settings: Any) -> Any:
    patient = {"request_timeout_s": 1e6, "stall_s": 1e4}
    async with running_pool(*engines, **patient | settings) as pool, anyio.create_task_group() as tasks:
        load = Load(pool, lanes)
        tasks.start_soon(load.run)
        yield load
        load.is_over = True


def states(pool: EnginePool) -> dict[str, str]:
    return {engine.name: engine.state for engine in pool.statistics()}


# -- engines that are late, or fail for a while -----------------------------------------------------------------------


async def test_an_engine_that_answers_late_holds_nobody_back() -> None:
    times = {}
    for engines in ([Stamped("good")], [Stamped("late", delay_s=30.0), Stamped("good")]):
        async with loaded(*engines, lanes=4) as load:
            began = anyio.current_time()
            await load.until(400)
            times[len(engines)] = anyio.current_time() - began
            if len(engines) == 2:
                late, good = load.pool.statistics()
                assert (good.state, good.late) == ("up", 0)
                assert late.late >= MAX_IN_A_ROW
                assert late.state in ("down", "trial")
                assert "much later than those of the other engines" in str(late.last_error)
                assert late.failed == 0
        assert_stamped(load.done)
    assert times[1] >= 0.9 * times[2]


async def test_engines_that_are_all_slow_keep_their_requests() -> None:
    async with loaded(Stamped("a", delay_s=30.0), Stamped("b", delay_s=40.0)) as load:
        await load.until(100)
        assert [engine.late for engine in load.pool.statistics()] == [0, 0]
    assert_stamped(load.done)


class SlowSamples(Stamped):
    """Is slow with one sample in ten, as all engines are that get it."""

    seen: list[int]

    async def generate(self, request: GenerationRequest, sink: TokenSink) -> GenerationEnd:
        if request.sample_index % 10 == 0:
            self.seen.append(request.sample_index)
            await anyio.sleep(60)
        return await super().generate(request, sink)


async def test_a_request_that_is_slow_everywhere_is_not_moved_for_ever() -> None:
    engines, seen = [SlowSamples(f"engine {i}") for i in range(6)], list[int]()
    for engine in engines:
        engine.seen = seen
    async with loaded(*engines) as load:
        await load.until(200)
    assert_stamped(load.done)
    requests = [seen.count(index) for index in set(seen)]
    assert 1 < max(requests) <= 1 + MAX_MOVES


@pytest.mark.parametrize("slots", [1, 4])
async def test_an_engine_that_never_answers_is_named_although_all_is_cut_before_that_is_a_stall(slots: int) -> None:
    """Each new version cuts what is in flight. The other engine is full, so that nothing moves there either."""
    good, dumb = Stamped("good"), Stamped("dumb", max_in_flight=slots)
    version = 0
    async with loaded(good, dumb, lanes=12, stall_s=60.0, policy_version=lambda: version) as load:
        await load.until(20)
        dumb.is_free = anyio.Event()
        began = anyio.current_time()
        while states(load.pool)["dumb"] == "up":
            assert anyio.current_time() - began < 60 + (4 if slots > 1 else 12) * 7
            await anyio.sleep(7)
            assert load.pool.interrupt() > 0
        assert anyio.current_time() - began > 55
        assert "no token for" in str(load.pool.statistics()[1].last_error)
        assert load.pool.statistics()[1].stalled >= MAX_IN_A_ROW
        served = dumb.served
        for _ in range(20):
            await anyio.sleep(7)
            load.pool.interrupt()
        assert served < dumb.served <= served + 21 * 2, "one at a time: a cut trial is no success"
        assert states(load.pool)["dumb"] != "up"
        dumb.is_free.set()
        while states(load.pool)["dumb"] != "up":
            await load.until(1)
        await load.until(50)
    assert_stamped(load.done)


async def test_engines_that_are_cut_while_they_say_something_stay_up() -> None:
    engines = [Stamped("one", first_token_s=2.0), Stamped("two", first_token_s=6.9)]
    async with loaded(*engines, stall_s=10.0) as load:
        for _ in range(60):
            await anyio.sleep(7)
            load.pool.interrupt()
        assert states(load.pool) == {"one": "up", "two": "up"}
        assert sum(engine.failed for engine in load.pool.statistics()) == 0


async def test_a_request_is_not_moved_where_there_is_no_room() -> None:
    slow, quick = Stamped("slow", delay_s=10.0), Stamped("quick", max_in_flight=1)
    async with loaded(slow, quick, lanes=20) as load:
        await load.until(200)
        assert load.pool.waiting
        assert load.pool.statistics()[0].late == 0
    assert_stamped(load.done)


async def test_an_engine_that_fails_is_tried_with_one_request_and_used_again() -> None:
    sick, good = Stamped("sick"), Stamped("good")
    async with loaded(sick, good) as load:
        await load.until(10)
        sick.fails = True
        while states(load.pool)["sick"] != "down":
            await load.until(1)
        sick.most, before = 0, sick.served
        await load.until(1000)
        assert sick.most == 1, "one trial at a time"
        assert 1 <= sick.served - before <= 20, "and not often"
        sick.fails = False
        while states(load.pool)["sick"] != "up":
            await load.until(1)
    assert_stamped(load.done)


# -- which engines may work -------------------------------------------------------------------------------------------


async def test_an_engine_that_was_restarted_gets_no_work_until_it_is_known_to_hold_the_version() -> None:
    one, two = Stamped("one", version=3), Stamped("two", version=3)
    async with loaded(one, two) as load:
        load.pool.hold(3)
        await load.until(50)
        one.process, one.version = "2", 0
        while states(load.pool)["one"] != "outdated":
            await load.until(1)
        while one.now:  # what it has is its own; it was not told apart in time
            await load.until(1)
        before = one.served
        await load.until(100)
        assert one.served == before
        one.version = 3
        load.pool.hold(3)
        await load.until(50)
        assert one.served > before
        assert states(load.pool) == {"one": "up", "two": "up"}


@pytest.mark.parametrize("reports", [False, True])
async def test_a_probe_that_began_before_the_version_was_set_says_nothing_of_it(reports: bool) -> None:
    """Its answer is of the time before: taken for the time after, the next one would look like a restart."""
    one = Stamped("one", reports=reports)
    async with loaded(one) as load:
        one.probe_s = 2.0
        for version in range(1, 30):
            await anyio.sleep(0.9)
            one.version, one.process = version, f"process {version}"
            load.pool.hold(version)
        await anyio.sleep(30)
        assert states(load.pool) == {"one": "up"}
        assert load.pool.statistics()[0].policy_version == 29


async def test_one_that_was_away_when_the_version_was_set_gets_no_work_and_is_named() -> None:
    away, here = Stamped("away"), Stamped("here", version=1)
    away.is_away = True
    async with loaded(away, here) as load:
        load.pool.hold(1)
        await load.until(10)
        away.is_away = False
        await load.until(200)
        assert states(load.pool)["away"] == "outdated"
        assert away.served == 0
        away.version, away.reports = 1, True
        await load.until(200)
        assert away.served > 0, "its own report is enough"
    assert_stamped(load.done)


@pytest.mark.parametrize("process", ["1", "2", None])
async def test_after_a_restart_of_the_daemon_only_engines_that_are_the_same_go_on(process: str | None) -> None:
    held: dict[str, tuple[int | None, str | None]] = {}
    engine = Stamped("one", version=5)
    async with loaded(engine, on_held=lambda name, *what: held.update({name: what})) as load:
        load.pool.hold(5)
        await load.until(20)
    assert held == {"one": (5, "1 -")}
    engine.process = process
    async with running_pool(engine, known=KnownParameters(version=5, held=held)) as pool:
        assert states(pool) == {"one": "up" if process == "1" else "outdated"}


# -- weight updates ---------------------------------------------------------------------------------------------------


class Versions:
    """What a daemon's ledger would know."""

    def __init__(self) -> None:
        self.current = 0

    def __call__(self) -> int:
        return self.current


async def update(
    load: Load, versions: Versions, version: int, mode: Any = "abort", *, rolling: bool = False, timeout_s: float = 60.0
) -> dict[str, str | None]:
    def on_first() -> None:
        versions.current = version

    reports = await load.pool.update_parameters(
        ParameterUpdate(f"/weights/{version}", version), mode, rolling=rolling, timeout_s=timeout_s, on_first=on_first
    )
    assert all(report.updated == (report.error is None) for report in reports)
    return {report.engine: report.error for report in reports}


@pytest.mark.parametrize("rolling", [False, True])
@pytest.mark.parametrize("mode", ["abort", "finish", "keep"])
async def test_every_token_counts_under_the_version_that_produced_it(mode: str, rolling: bool) -> None:
    engines = [Stamped(f"engine {i}", first_token_s=0.01 * i, reports=i == 1) for i in range(3)]
    versions = Versions()
    async with loaded(*engines, policy_version=versions, lanes=16, stall_s=0.5) as load:
        for version in (1, 2, 5):
            await load.until(30)
            assert await update(load, versions, version, mode, rolling=rolling) == {e.name: None for e in engines}
            assert versions.current == version
        await load.until(30)
        interrupted = sum(engine.interrupted for engine in load.pool.statistics())
        assert (interrupted > 0) == (mode == "abort")
        assert all(engine.stalled == 0 for engine in load.pool.statistics()), "kept requests are silent for a reason"
    assert_stamped(load.done)
    assert {version for sample in load.done for version, _ in sample.versions} == {0, 1, 2, 5}
    assert [[u.version for u in engine.updates] for engine in engines] == [[1, 2, 5]] * 3


async def test_while_one_after_the_other_is_updated_the_rest_works() -> None:
    engines = [Stamped(f"engine {i}") for i in range(3)]
    versions, at_work = Versions(), []
    async with loaded(*engines, policy_version=versions) as load, anyio.create_task_group() as tasks:

        async def watch() -> None:
            while True:
                at_work.append(sum(state == "up" for state in states(load.pool).values()))
                await anyio.sleep(0.05)

        await load.until(20)
        tasks.start_soon(watch)
        done = len(load.done)
        await update(load, versions, 1, rolling=True)
        assert len(load.done) > done
        tasks.cancel_scope.cancel()
    assert min(at_work) == 2
    assert_stamped(load.done)


@pytest.mark.parametrize("error", [EngineRejected, EngineUnavailable])
async def test_an_engine_that_failed_to_update_gets_no_work_until_it_has_the_version(error: type[EngineError]) -> None:
    good, bad = Stamped("good"), Stamped("bad")
    bad.update_error = error
    versions = Versions()
    async with loaded(good, bad, policy_version=versions) as load:
        await load.until(20)
        report = await update(load, versions, 1)
        assert report["good"] is None
        assert "cannot" in str(report["bad"])
        before = bad.served
        await load.until(200)
        assert bad.served == before
        assert states(load.pool)["bad"] in ("outdated", "updating")
        bad.update_error = None
        await load.until(200)
        was_refused = error is EngineRejected
        assert (len(bad.updates) == 1) == was_refused, "what was refused is not tried again"
        assert (bad.served == before) == was_refused
        assert await update(load, versions, 2) == {"good": None, "bad": None}
        await load.until(50)
        assert bad.served > before
    assert_stamped(load.done)


async def test_an_engine_that_comes_back_is_given_the_version_in_force() -> None:
    one, two = Stamped("one"), Stamped("two")
    versions = Versions()
    async with loaded(one, two, policy_version=versions) as load:
        await load.until(10)
        two.is_away = True
        while states(load.pool)["two"] != "down":
            await load.until(1)
        report = await update(load, versions, 4)
        assert "away" in str(report["two"])
        two.is_away, two.process = False, "2"
        while states(load.pool)["two"] != "up":
            await load.until(1)
        assert (two.version, two.updates[-1].path) == (4, "/weights/4")
        before = len(two.updates)
        two.process, two.version = "3", 0  # restarted, with the parameters it was started with
        while len(two.updates) == before:
            await load.until(1)
        await load.until(50)
        assert two.version == 4


@pytest.mark.parametrize("mode", ["abort", "finish", "keep"])
async def test_an_update_waits_for_an_engine_that_is_just_given_the_version_before(mode: str) -> None:
    one, two = Stamped("one"), Stamped("two")
    versions = Versions()
    async with loaded(one, two, policy_version=versions) as load:
        await load.until(10)
        assert await update(load, versions, 1) == {"one": None, "two": None}
        two.process, two.version, two.update_s = "2", 0, 30.0
        while len(two.updates) < 2:
            await load.until(1)
        assert (two.is_loading, two.updates[-1].version) == (True, 1)
        two.update_s, done = 1.0, len(load.done)
        assert await update(load, versions, 2, mode) == {"one": None, "two": None}
        assert [one.version, two.version, versions.current] == [2, 2, 2]
        await load.until(50)
        assert set(states(load.pool).values()) == {"up"}
        assert len(two.updates) == 3
    assert_stamped(load.done[done:])


async def test_where_no_engine_took_them_all_go_on_as_before() -> None:
    engines = [Stamped("one"), Stamped("two")]
    versions = Versions()
    async with loaded(*engines, policy_version=versions) as load:
        await load.until(10)
        for engine in engines:
            engine.update_error = EngineRejected
        report = await update(load, versions, 1)
        assert all(report.values())
        await load.until(50)
        assert versions.current == 0
        assert set(states(load.pool).values()) == {"up"}
    assert_stamped(load.done)


async def test_where_nobody_knows_what_the_engines_hold_none_works_until_somebody_says_so() -> None:
    engines = [Stamped("one"), Stamped("two")]
    versions = Versions()
    async with loaded(*engines, policy_version=versions) as load:
        await load.until(10)
        for engine in engines:
            engine.update_error = EngineUnavailable
        assert all((await update(load, versions, 1)).values())
        served = [engine.served for engine in engines]
        await anyio.sleep(60)
        assert [engine.served for engine in engines] == served
        assert set(states(load.pool).values()) == {"outdated"}
        load.pool.hold(0)
        await load.until(20)
    assert_stamped(load.done)


@pytest.mark.parametrize("mode", ["finish", "abort"])
async def test_an_update_that_takes_too_long_is_given_up_and_said_so(mode: str) -> None:
    quick, slow = Stamped("quick"), Stamped("slow")
    slow.update_s = 1e6
    versions = Versions()
    async with loaded(quick, slow, policy_version=versions) as load:
        await load.until(10)
        report = await update(load, versions, 1, mode, timeout_s=20)
        assert report == {"quick": None, "slow": "it did not finish within 20 s"}
        assert versions.current == 1
        before = slow.served
        await load.until(50)
        assert slow.served == before, "nobody knows what it holds"


async def test_a_cancelled_update_leaves_no_engine_with_unknown_parameters_at_work() -> None:
    one, two = Stamped("one"), Stamped("two")
    versions = Versions()
    one.update_s, two.update_s = 1.0, 1e6
    async with loaded(one, two, policy_version=versions) as load:
        load.pool.hold(0)
        await load.until(10)
        with anyio.move_on_after(10):
            await update(load, versions, 1)
        assert versions.current == 1
        two.update_s = 1.0
        while states(load.pool)["two"] != "up":
            await load.until(1)
        assert two.version == 1, "it was given the version again"
        await load.until(50)
    assert_stamped(load.done)


# -- engines that come and go -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("after_s", [0.0, 0.1])
async def test_an_engine_that_is_added_is_used_and_one_that_is_removed_loses_no_token(after_s: float) -> None:
    first, second = Stamped("first"), Stamped("second", seed=0)
    async with loaded(first) as load:
        await load.until(20)
        await load.pool.add(second)
        await load.until(50)
        assert second.served > 0
        if after_s:
            await anyio.sleep(after_s)  # a part of what they generate is there; before, slots were just given
        assert load.pool.remove("first") > 0
        before = first.served
        await load.until(100)
        assert (first.served, first.now) == (before, 0)
        assert states(load.pool) == {"second": "up"}
        with pytest.raises(BadRequest, match="no engine 'first'; the engines are second"):
            load.pool.remove("first")
        with pytest.raises(BadRequest, match="there is already an engine 'second'"):
            await load.pool.add(Stamped("second"))
    assert_stamped(load.done)
    for sample in load.done:
        assert list(sample.tokens) == first.expected_response(PROMPT, SAMPLING, sample.index)[0]
    assert any(sample.metadata.get("pieces", 1) > 1 for sample in load.done) == (after_s > 0)


async def test_a_drained_engine_ends_what_it_has_and_gets_nothing_new() -> None:
    one, two = Stamped("one"), Stamped("two")
    async with loaded(one, two) as load:
        await load.until(20)
        assert load.pool.drain("one") == 4
        await anyio.lowlevel.checkpoint()  # a slot that was just given is worth nothing now
        before = one.served
        await load.until(100)
        assert (one.served, one.now) == (before, 0)
        assert states(load.pool)["one"] == "draining"
        load.pool.drain("one", is_draining=False)
        await load.until(50)
        assert one.served > before
        assert sum(engine.interrupted for engine in load.pool.statistics()) == 0


class Foreign(Stamped):
    async def tokenize(self, text: str) -> list[int]:
        return [token + 1 for token in await super().tokenize(text)]


class TextOnly(Stamped):
    """Gives text alone, as a chat endpoint does."""

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__(name, **options)
        self.asked: list[GenerationRequest] = []

    async def probe(self) -> EngineInfo:
        return EngineInfo(model="chat", text_only=True, instance=self.process)

    async def tokenize(self, text: str) -> list[int]:
        raise EngineRejected(self.name, "it has no tokens")

    detokenize = tokenize  # type: ignore[assignment]

    async def generate(self, request: GenerationRequest, sink: TokenSink) -> GenerationEnd:
        self.asked.append(request)
        assert request.messages is not None
        assert not request.tokens
        for word in ("one ", "two ", "three"):
            await anyio.sleep(1)
            if self.fails and len(self.asked) == 1 and word == "three":
                raise EngineUnavailable(self.name, "broken")
            sink((), None, word)
        return GenerationEnd("stop")


@pytest.mark.parametrize("kind", [Foreign, TextOnly])
async def test_an_engine_that_does_not_fit_is_not_taken_in_and_harms_nobody(kind: type[Stamped]) -> None:
    async with loaded(Stamped("one")) as load:
        await load.until(10)
        with pytest.raises(
            EngineError, match=r"all engines of a run must serve the same model|cannot be used together"
        ):
            await load.pool.add(kind("other"))
        await load.until(10)
        assert states(load.pool) == {"one": "up"}


async def test_one_that_comes_back_as_another_model_is_not_used_and_says_why() -> None:
    one, other = Stamped("one"), Foreign("other")
    other.is_away = True
    async with loaded(one, other) as load:
        await load.until(10)
        other.is_away = False
        await load.until(200)
        assert states(load.pool) == {"one": "up", "other": "down"}
        assert "serve the same model" in str(load.pool.statistics()[1].last_error)
        assert other.served == 0


# -- engines that give text alone -------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["none", "failure", "interruption"])
async def test_a_sample_of_text_alone_is_marked_as_such_and_begins_anew_when_cut(fault: str) -> None:
    engine, version = TextOnly("chat"), 7
    engine.fails = fault == "failure"
    sample, messages = Sample(index=0), [{"role": "user", "content": "count"}]
    async with (
        running_pool(engine, policy_version=lambda: version, chunk_tokens=1) as pool,
        anyio.create_task_group() as tasks,
    ):
        assert await pool.is_text_only()
        tasks.start_soon(lambda: pool.generate(sample, [], SAMPLING, messages=messages))
        if fault == "interruption":
            await anyio.sleep(2.5)
            pool.interrupt()
            version = 8
    assert (sample.text, list(sample.tokens), sample.logprobs, sample.finish_reason) == (
        "one two three",
        [],
        None,
        "stop",
    )
    assert sample.metadata["text_only"] is True
    assert sample.versions == [[version, 0]]
    assert sample.oldest_version == version
    assert [request.max_new_tokens for request in engine.asked] == [N] * (1 if fault == "none" else 2)
