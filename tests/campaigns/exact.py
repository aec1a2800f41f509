"""Thousands of interruptions of groups in this process, in a loop whose clock jumps: exact to the token.

Three sources share two scripted engines with few slots. Everything that cuts a generation is done to them at random
moments: version changes, pauses, deaths of engines, stalls, parking and going on as after a restart. The engines keep a
diary of what they handed over, and under which version. At the end the groups have to be what the diary says.
"""

from __future__ import annotations

import random
from typing import Any, Final

import anyio
import anyio.lowlevel
import structlog
from anyio.abc import TaskGroup

from orchestrator.core.filters import Verdict
from orchestrator.core.ledger.ledger import Ledger, SourceSize
from orchestrator.engines import EnginePool, SamplingParams
from orchestrator.frames import GroupFrame
from orchestrator.production.finisher import Finisher
from orchestrator.production.local_runner import GroupSettings, LocalRunner
from orchestrator.production.prompt_reader import PromptReader
from orchestrator.production.runner import GroupOutcome
from orchestrator.production.scoring import Scorer
from orchestrator.production.turns import SingleTurn
from tests.campaigns.checks import must
from tests.campaigns.diary import Diary, Journaling, One, Rows
from tests.support.builders import MemoryJournal, launch
from tests.support.engine_pools import pool_of

SOURCES: Final = ("maths", "code", "talk")
SAMPLES: Final = 4
GROUPS_AT_A_TIME: Final = 4
SLOTS: Final = 6
SAMPLING: Final = SamplingParams(max_new_tokens=160)
HOW: Final[dict[str, Any]] = {"length": (20, 200), "tokens_per_s": 100.0, "chunk": 4, "seed": 11}
LONGEST_GAP_S: Final = 0.5
"""Of the jumping clock, between two interruptions; a response takes 0.2 to 1.6 s."""

OUTAGE_S: Final = 12.0
"""Longer than the time between two probes."""


class Scene:
    """All of it, on one version of the package."""

    def __init__(self, *, seed: int, rows: int, has_faults: bool, masks: bool) -> None:
        self.rng = random.Random(seed)
        self.diary = Diary()
        self.has_faults = has_faults
        self.masks = masks
        self.rows = rows
        faults = {"failure_rate": 0.05, "reset_rate": 0.1, "hang_rate": 0.05} if has_faults else {}
        self.engines = [
            Journaling(self.diary, name=name, max_in_flight=SLOTS, **HOW | faults) for name in ("one", "two")
        ]
        self.pool: EnginePool = pool_of(
            *self.engines,
            policy_version=lambda: self.diary.version,
            seed=seed,
            stall_s=2.0,
            max_retries=1000,
            chunk_tokens=50,
        )
        self.ledger = Ledger({name: SourceSize(rows, 1) for name in SOURCES}, nonce="campaign")
        self.journal = MemoryJournal(self.ledger)
        self.runners = {name: self._runner(name) for name in SOURCES}
        self.events: dict[str, int] = {}
        self.is_over = False

    def _runner(self, name: str) -> LocalRunner:
        return LocalRunner(
            prompts=PromptReader(Rows(name, self.rows), self.pool),
            turns=SingleTurn(self.pool),
            scorer=Scorer(One()),
            finisher=Finisher(verdict=lambda _: Verdict(keep=True), journal=self.journal, mask_offpolicy=self.masks),
            journal=self.journal,
            policy_version=lambda: self.diary.version,
            settings=GroupSettings(sampling=SAMPLING, sampling_header={}),
            log=structlog.get_logger(),
        )

    # -- the work ------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """To the end of all prompts."""
        async with anyio.create_task_group() as tasks:
            await tasks.start(self.pool.run)
            while not self.is_over:
                await self._until_parked()
            tasks.cancel_scope.cancel()

    async def _until_parked(self) -> None:
        """Work until all is done, or until somebody has everything parked, as at a restart."""
        async with anyio.create_task_group() as producers:
            for name in SOURCES:
                producers.start_soon(self._produce, name)
            async with anyio.create_task_group() as storm:
                storm.start_soon(self._interrupt, producers.cancel_scope, storm)
                storm.start_soon(self._watch, storm.cancel_scope)

    async def _watch(self, storm: anyio.CancelScope) -> None:
        while not self._is_done():  # noqa: ASYNC110 - the clock jumps
            await anyio.sleep(0.1)
        self.is_over = True
        storm.cancel()

    def _is_done(self) -> bool:
        return all(
            state.launched == self.rows and not state.in_flight for state in (self.ledger.source(n) for n in SOURCES)
        )

    async def _produce(self, name: str) -> None:
        state = self.ledger.source(name)
        async with anyio.create_task_group() as groups:
            room = anyio.Semaphore(GROUPS_AT_A_TIME)

            async def one(flight: Any) -> None:
                async with room:
                    outcome = await self.runners[name].run(flight)
                must(outcome is GroupOutcome.BUFFERED, f"group {flight.group_index}: {outcome}")

            for flight in list(state.in_flight.values()):
                groups.start_soon(one, flight)
            while True:
                async with room:
                    event = launch(self.journal, name, n=SAMPLES, rows=self.rows)
                if event is None:
                    return
                groups.start_soon(one, state.in_flight[event.group_index])
                await anyio.lowlevel.checkpoint()

    # -- the interruptions ---------------------------------------------------------------------------------------------

    async def _interrupt(self, producers: anyio.CancelScope, deaths: TaskGroup) -> None:
        kinds = ["version", "pause abort", "pause finish", "pause abort", "version", "park"]
        if self.has_faults:
            kinds.append("death")
        while True:
            await anyio.sleep(self.rng.uniform(0, LONGEST_GAP_S))
            kind = self.rng.choice(kinds)
            self.events[kind] = self.events.get(kind, 0) + 1
            match kind:
                case "version":
                    self._set_version()
                    self.pool.interrupt()
                case "pause abort" | "pause finish":
                    await self._pause(kind)
                case "death":
                    deaths.start_soon(self._death, self.rng.choice(self.engines))
                case "park":
                    producers.cancel()
                    await anyio.sleep_forever()

    def _set_version(self) -> None:
        self.diary.version += 1
        self.pool.hold(self.diary.version)

    async def _pause(self, kind: str) -> None:
        self.pool.pause()
        cut = {sample for sample, tokens in self.diary.under_way.items() if tokens}
        if kind == "pause abort":
            self.pool.interrupt()
        with anyio.fail_after(1000):
            await self.pool.quiet()
        must(not self.diary.under_way, "a pause returned while something was generated")
        asked = len(self.diary.asked)
        await anyio.sleep(self.rng.uniform(0, 1))
        must(len(self.diary.asked) == asked, "something was asked for in a pause")
        self._set_version()
        self.pool.resume()
        if not self.has_faults and kind == "pause abort":
            await self._continuations_come_first(cut, asked)

    async def _continuations_come_first(self, cut: set[int], asked: int) -> None:
        """As many as there are slots begin at once; those that were cut have tokens, which are paid for."""
        for _ in range(4):
            await anyio.lowlevel.checkpoint()
        began = self.diary.asked[asked : asked + 2 * SLOTS]
        must(len(began) >= len(cut), f"{len(began)} requests after a pause that cut {len(cut)}")
        first = [sample for sample, had in began[: len(cut)] if had]
        must(set(first) >= cut or len(first) == len(cut), f"a fresh prompt came before what was cut: {began}, {cut}")

    async def _death(self, engine: Journaling) -> None:
        """It dies, and is there again after a while; it gets work when it is told the next version."""
        engine.die()
        try:
            await anyio.sleep(self.rng.uniform(0, OUTAGE_S))
        finally:
            engine.is_dead = False

    # -- what came of it -----------------------------------------------------------------------------------------------

    def check(self) -> int:
        """Raises ``Failure``; returns how many generations were interrupted."""
        frames = [GroupFrame(body) for kind, body in self.journal.records if kind == "group"]
        prompts = {(frame.header["source"], frame.header["prompt_index"]) for frame in frames}
        must(len(frames) == len(prompts) == len(SOURCES) * self.rows, f"{len(frames)} groups of {len(prompts)} prompts")
        cuts = 0
        for frame in frames:
            prompt = frame.column("prompt_tokens").tolist()
            offsets = frame.column("response_offsets").tolist()
            for i, header in enumerate(frame.header["samples"]):
                part = slice(offsets[i], offsets[i + 1])
                columns = {
                    name: frame.column(name)[part].tolist() for name in ("response_tokens", "logprobs", "loss_mask")
                }
                self._check_sample(header, prompt, columns)
                cuts += header["metadata"].get("pieces", 1) - 1
        return cuts

    def _check_sample(self, header: dict[str, Any], prompt: list[int], columns: dict[str, list[Any]]) -> None:
        index = header["index"]
        tokens, logprobs = self.engines[0].expected_response(prompt, SAMPLING, index)
        must(columns["response_tokens"] == tokens, f"sample {index}: other tokens than the engines'")
        near = all(abs(a - b) < 1e-5 for a, b in zip(columns["logprobs"], logprobs, strict=True))
        must(near, f"sample {index}: other log-probabilities than the engines'")
        handed = self.diary.handed[index]
        ends = [0, *(begin + count for begin, count, _ in handed)]
        must([begin for begin, _, _ in handed] == ends[:-1], f"sample {index}: tokens lost or twice: {handed}")
        must(ends[-1] == len(tokens), f"sample {index}: {len(tokens)} tokens, {ends[-1]} handed over")
        expected = [version for _, count, version in handed for _ in range(count)]
        given = [version for version, count in header["versions"] for _ in range(count)]
        must(given == expected, f"sample {index}: versions {given}, the engines say {expected}")
        mask = [int(not self.masks or version == given[-1]) for version in given]
        must(columns["loss_mask"] == mask, f"sample {index}: mask {columns['loss_mask']} of versions {given}")


async def play(*, seed: int, rows: int, has_faults: bool, masks: bool) -> Scene:
    """One scene from its beginning to its end, not yet checked."""
    scene = Scene(seed=seed, rows=rows, has_faults=has_faults, masks=masks)
    await scene.run()
    return scene
