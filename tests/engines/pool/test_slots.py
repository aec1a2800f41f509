"""Slots of engines, backoff, and the watch for stop texts: what decides, without requests."""

from __future__ import annotations

import random
from itertools import pairwise

import anyio
import anyio.lowlevel
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.concurrency.broadcast import Broadcast
from orchestrator.engines.pool.backoff import MAX_BACKOFF_S, backoff
from orchestrator.engines.pool.lateness import LATE_FLOOR_S
from orchestrator.engines.pool.member import Member
from orchestrator.engines.pool.requests_in_flight import RequestsInFlight
from orchestrator.engines.pool.slots import A_TURN, Slots
from orchestrator.engines.pool.stop_texts import StopWatch, cut_at_stop
from orchestrator.engines.scripted import ScriptedEngine


def members(*rooms: int) -> list[Member]:
    made = [Member(ScriptedEngine(name=f"e{i}", max_in_flight=room)) for i, room in enumerate(rooms)]
    for member in made:
        member.health.probe_succeeded()
    return made


class Queue:
    """Waiters, in the order in which they are begun; ``given`` is the order in which they got their engine."""

    def __init__(self, slots: Slots, tasks: anyio.abc.TaskGroup) -> None:
        self.slots = slots
        self.tasks = tasks
        self.given: list[tuple[str, Member]] = []

    async def join(self, name: str, **how: object) -> None:
        async def wait() -> None:
            self.given.append((name, await self.slots.acquire(**how)))  # type: ignore[arg-type]

        self.tasks.start_soon(wait)
        await anyio.wait_all_tasks_blocked()

    @property
    def names(self) -> str:
        return "".join(name for name, _ in self.given)


async def test_no_engine_has_more_than_its_bound_and_the_least_loaded_is_taken() -> None:
    one, two = pair = members(1, 3)
    slots = Slots(pair)
    async with anyio.create_task_group() as tasks:
        queue = Queue(slots, tasks)
        for name in "abcde":
            await queue.join(name)
        assert (one.in_flight, two.in_flight, slots.waiting) == (1, 3, 1)
        slots.release(two)
        await anyio.wait_all_tasks_blocked()
        assert (queue.names, two.in_flight, slots.waiting) == ("abcde", 3, 0)


async def test_a_turn_of_the_loop_begins_few_requests_however_many_wait() -> None:
    (one,) = members(1000)
    slots, waiting, turns = Slots([one]), 5 * A_TURN + 3, [0]
    async with anyio.create_task_group() as tasks:
        slots.is_open = False
        for _ in range(waiting):
            tasks.start_soon(slots.acquire)
        await anyio.wait_all_tasks_blocked()
        slots.is_open = True
        slots.dispatch()
        while turns[-1] < waiting and len(turns) < 1000:
            turns.append(one.in_flight)
            await anyio.lowlevel.checkpoint()
    assert max(after - before for before, after in pairwise(turns)) == A_TURN
    assert (one.in_flight, slots.waiting) == (waiting, 0)


async def test_continuations_come_first_and_within_a_kind_it_is_first_come_first_served() -> None:
    (one,) = members(1)
    slots = Slots([one])
    async with anyio.create_task_group() as tasks:
        queue = Queue(slots, tasks)
        await queue.join("0")
        for name, is_continued in (("a", False), ("b", False), ("C", True), ("D", True)):
            await queue.join(name, is_continued=is_continued)
        for _ in range(4):
            slots.release(one)
            await anyio.wait_all_tasks_blocked()
        assert queue.names == "0CDab"


async def test_the_engine_that_holds_the_prefix_is_preferred() -> None:
    one, two = pair = members(4, 4)
    slots = Slots(pair)
    one.in_flight = 3
    assert await slots.acquire(preferred=one) is one
    assert await slots.acquire(preferred=one) is two, "it is full now"


async def test_an_engine_that_failed_a_sample_is_avoided_even_if_the_other_is_full() -> None:
    bad, good = pair = members(4, 1)
    slots = Slots(pair)
    async with anyio.create_task_group() as tasks:
        queue = Queue(slots, tasks)
        good.in_flight = 1
        await queue.join("a", avoided=bad)
        assert slots.waiting == 1
        await queue.join("b")
        assert queue.given == [("b", bad)], "others do not wait behind it"
        slots.release(good)
        await anyio.wait_all_tasks_blocked()
        assert queue.given[1:] == [("a", good)]


async def test_an_engine_that_failed_a_sample_is_used_again_when_no_other_is_up() -> None:
    bad, other = pair = members(4, 1)
    slots = Slots(pair)
    async with anyio.create_task_group() as tasks:
        queue = Queue(slots, tasks)
        other.in_flight = 1
        await queue.join("a", avoided=bad)
        other.health.probe_failed("gone")
        slots.dispatch()
        await anyio.wait_all_tasks_blocked()
        assert queue.given == [("a", bad)]


async def test_nothing_is_sent_to_an_engine_that_is_down_or_while_dispatch_is_closed() -> None:
    (one,) = members(4)
    slots = Slots([one])
    async with anyio.create_task_group() as tasks:
        queue = Queue(slots, tasks)
        one.health.probe_failed("gone")
        await queue.join("a")
        slots.is_open = False
        one.health.probe_succeeded()
        slots.dispatch()
        await anyio.wait_all_tasks_blocked()
        assert (queue.names, slots.waiting) == ("", 1)
        slots.is_open = True
        slots.dispatch()
        await anyio.wait_all_tasks_blocked()
        assert (queue.names, slots.waiting) == ("a", 0)


@pytest.mark.parametrize("is_given", [False, True])
async def test_a_waiter_that_is_cancelled_leaves_nothing_behind(is_given: bool) -> None:
    (one,) = members(1)
    slots = Slots([one])
    await slots.acquire()

    async def use() -> None:
        member = await slots.acquire()
        try:
            await anyio.sleep_forever()
        finally:
            slots.release(member)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(use)
        await anyio.wait_all_tasks_blocked()
        if is_given:
            slots.release(one)  # the slot is the waiter's, who does not know it yet
        tasks.cancel_scope.cancel()
    if not is_given:
        slots.release(one)
    assert (one.in_flight, slots.waiting) == (0, 0)


@pytest.mark.parametrize("why", ["closed", "draining"])
async def test_a_slot_that_was_given_and_not_used_yet_is_worth_nothing_once_its_engine_may_not_work(why: str) -> None:
    one, two = pair = members(1, 1)
    slots = Slots(pair)
    two.in_flight = 1
    async with anyio.create_task_group() as tasks:
        queue = Queue(slots, tasks)
        one.in_flight = 1
        await queue.join("a")
        slots.release(one)  # the slot is the waiter's, who does not know it yet
        if why == "closed":
            slots.is_open = False
        else:
            one.is_draining = True
        await anyio.wait_all_tasks_blocked()
        assert (queue.given, one.in_flight, slots.waiting) == ([], 0, 1)
        slots.is_open = True
        slots.release(two)
        await anyio.wait_all_tasks_blocked()
        assert [name for name, _ in queue.given] == ["a"]
        assert (queue.given[0][1] is two) == (why == "draining")


async def test_no_more_requests_are_moved_than_there_is_room_for() -> None:
    slow, quick = members(8, 8)
    for _ in range(20):
        quick.first_token.add(0.0)
    quick.in_flight = 5
    requests = RequestsInFlight(Broadcast())
    begun = [requests.begin(slow, timeout_s=60, stall_s=60, may_move=index != 0) for index in range(6)]
    for flight in begun:
        flight.began -= LATE_FLOOR_S
    requests.heard(begun[1], of_tokens=False)
    assert requests.move_late(lambda member: [] if member is quick else [quick]) == 3
    assert [flight.is_late for flight in begun] == [False, False, True, True, True, False]


# -- backoff -----------------------------------------------------------------------------------------------


@given(st.integers(0, 10_000), st.integers(0, 1 << 32))
def test_backoff_grows_to_a_bound_and_is_the_seeds(failures: int, seed: int) -> None:
    wait = backoff(random.Random(seed), failures)
    assert 0 <= wait <= min(MAX_BACKOFF_S, 0.1 * 2 ** min(failures, 20))
    assert wait == backoff(random.Random(seed), failures)


# -- stop texts -------------------------------------------------------------------------------------------------------


@given(
    st.text("ab\n", max_size=30),
    st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.integers(0, 30), max_size=5),
)
def test_a_watch_finds_a_stop_text_wherever_the_text_is_cut(text: str, stops: list[str], cuts: list[int]) -> None:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    watch = StopWatch(stops)
    found = [watch.add(text[begin:end]) for begin, end in pairwise(edges)]
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    first = min(ends, default=None)
    expected = next((i for i, end in enumerate(edges[1:]) if first is not None and end >= first), None)
    assert (found.index(True) if any(found) else None) == expected


@given(st.text("ab", max_size=20), st.lists(st.text("ab", max_size=3), max_size=3))
def test_the_text_ends_before_the_first_stop_text(text: str, stops: list[str]) -> None:
    cut = cut_at_stop(text, stops)
    assert text.startswith(cut)
    assert not any(stop and stop in cut for stop in stops)
    assert cut == text or any(stop and text[len(cut) :].startswith(stop) for stop in stops)


def test_no_stop_text_and_an_empty_one_stop_nothing() -> None:
    assert not StopWatch([]).add("anything")
    assert not StopWatch([""]).add("anything")
    assert cut_at_stop("anything", [""]) == "anything"
