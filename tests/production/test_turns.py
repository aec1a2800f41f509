"""A turn loop of two turns with a tool between them, on the real pool and the real runner, cut wherever it can be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import anyio
import pytest
import structlog

from orchestrator.core.filters import Verdict
from orchestrator.core.ledger.groups import InFlight
from orchestrator.core.ledger.ledger import Ledger, SourceSize
from orchestrator.core.ledger.partials import encode_partial, restore_samples
from orchestrator.core.staleness import is_stale, newest_version
from orchestrator.engines import EnginePool, SamplingParams, ScriptedEngine, TurnRequest
from orchestrator.frames import GroupFrame
from orchestrator.production.finisher import Finisher
from orchestrator.production.local_runner import GroupSettings, LocalRunner
from orchestrator.production.prompt_reader import PromptReader
from orchestrator.production.runner import GroupOutcome
from orchestrator.production.scoring import Scorer
from orchestrator.production.turns import SampleTask
from orchestrator.records import NO_VERSION, Sample
from tests.campaigns.diary import One, Rows
from tests.support.builders import MemoryJournal, launch
from tests.support.engine_pools import DEADLINE_S, running_pool
from tests.support.engine_time import JUMPING

SAMPLING = SamplingParams(max_new_tokens=40)
"""Of each of the two turns."""

TOOL = list(b"<tool>42</tool>")
N = 2


@pytest.fixture
def anyio_backend() -> tuple[str, Any]:
    """Waits cost nothing: no test here has a socket, a file or a thread."""
    return ("asyncio", dict(JUMPING))


class ToolLoop:
    """Asks, appends what a tool says, asks again."""

    def __init__(self, pool: EnginePool) -> None:
        self._pool = pool

    async def finish(self, task: SampleTask) -> None:
        sample, engine = task.sample, None
        while True:
            end = await self._pool.turn(
                TurnRequest(
                    sample=sample,
                    prompt_tokens=task.prompt_tokens,
                    sampling=task.sampling,
                    begin=sample.turn_begin,
                    trial=task.trial,
                    engine=engine,
                ),
                before_piece=task.before_request,
                after_piece=task.store,
            )
            engine = end.engine
            if sample.turn_begin:
                sample.end(end.reason, end.text)
                return
            sample.append_context(TOOL)
            await task.store(sample)


def expected(engine: ScriptedEngine, prompt: Sequence[int], index: int) -> tuple[list[int], list[float], list[int]]:
    """Tokens, log-probabilities and mask of the whole sample, from what the script says of each turn alone."""
    first, first_logprobs = engine.expected_response(prompt, SAMPLING, index)
    second, second_logprobs = engine.expected_response([*prompt, *first, *TOOL], SAMPLING, index)
    return (
        [*first, *TOOL, *second],
        [*first_logprobs, *[0.0] * len(TOOL), *second_logprobs],
        [*[1] * len(first), *[0] * len(TOOL), *[1] * len(second)],
    )


class Scene:
    """One source and its journal; everything else is made anew by each start, as a daemon does."""

    def __init__(self, *, masks: bool = False) -> None:
        self.version = 0
        self.masks = masks
        self.ledger = Ledger({"agent": SourceSize(10)}, nonce="n")
        self.journal = MemoryJournal(self.ledger)
        assert launch(self.journal, "agent", n=N) is not None

    def engine(self) -> ScriptedEngine:
        return ScriptedEngine(name="e", chunk=4, seed=5, tokens_per_s=10.0)

    def launched(self) -> InFlight:
        (launched,) = self.ledger.source("agent").in_flight.values()
        return launched

    def runner(self, pool: EnginePool) -> LocalRunner:
        return LocalRunner(
            prompts=PromptReader(Rows("agent", 10), pool),
            turns=ToolLoop(pool),
            scorer=Scorer(One()),
            finisher=Finisher(verdict=lambda _: Verdict(True), journal=self.journal, mask_offpolicy=self.masks),
            journal=self.journal,
            policy_version=lambda: self.version,
            settings=GroupSettings(sampling=SAMPLING, sampling_header={}),
            log=structlog.get_logger(),
        )

    async def start(self, *, interrupted_at_s: float | None = None, killed_at_s: float | None = None) -> bool:
        """Work on the group; whether it ended. An interruption sets the next version, as a trainer does."""
        async with running_pool(self.engine(), policy_version=lambda: self.version, chunk_tokens=16) as pool:
            with anyio.move_on_after(killed_at_s or 1000) as life, anyio.fail_after(2000):
                async with anyio.create_task_group() as tasks:
                    if interrupted_at_s is not None:
                        tasks.start_soon(self._interrupt, pool, interrupted_at_s)
                    outcome = await self.runner(pool).run(self.launched())
                    tasks.cancel_scope.cancel()
            if not life.cancelled_caught:
                assert outcome is GroupOutcome.BUFFERED
            return not life.cancelled_caught

    async def _interrupt(self, pool: EnginePool, at_s: float) -> None:
        await anyio.sleep(at_s)
        self.version += 1
        assert pool.interrupt() == N

    def restart(self) -> None:
        """What a new process reads back of the log."""
        self.ledger = self.journal.replayed({"agent": SourceSize(10)})
        self.journal.ledger = self.ledger

    def samples(self) -> list[dict[str, Any]]:
        (frame,) = [GroupFrame(body) for kind, body in self.journal.records if kind == "group"]
        prompt, offsets = frame.column("prompt_tokens").tolist(), frame.integers("response_offsets")
        columns = {name: frame.column(name).tolist() for name in ("response_tokens", "logprobs", "loss_mask")}
        return [
            {
                "prompt": prompt,
                **header,
                **{name: column[offsets[i] : offsets[i + 1]] for name, column in columns.items()},
            }
            for i, header in enumerate(frame.header["samples"])
        ]

    def check(self) -> list[list[int]]:
        """Every sample is what the script says; returns the versions token by token."""
        of_samples = []
        for sample in self.samples():
            tokens, logprobs, mask = expected(self.engine(), sample["prompt"], sample["index"])
            assert sample["response_tokens"] == tokens
            assert sample["logprobs"] == pytest.approx(logprobs)
            versions = [version for version, count in sample["versions"] for _ in range(count)]
            assert len(versions) == len(tokens)
            assert [version == NO_VERSION for version in versions] == [not of_policy for of_policy in mask]
            kept = versions[-1] if self.masks else None
            wanted = [int(m and (kept is None or v == kept)) for m, v in zip(mask, versions, strict=True)]
            assert sample["loss_mask"] == wanted
            assert sample["finish_reason"] == "length"
            of_samples.append(versions)
        return of_samples


TURN = SAMPLING.max_new_tokens
BEHIND = TURN + len(TOOL)
"""Where the second turn begins. A token takes 0.1 s and four come together."""


async def test_two_turns_are_what_the_engine_says_with_the_tools_answer_between_them() -> None:
    scene = Scene()
    assert await scene.start()
    assert scene.check() == [[0] * TURN + [NO_VERSION] * len(TOOL) + [0] * TURN] * N


CUTS = {0.5: 0, 1.7: 12, 3.9: 32, 4.1: 36, 5.0: BEHIND + 4, 6.5: BEHIND + 20, 7.9: BEHIND + 32}
"""When the process ends, and the first token behind the interruption just before that."""


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("killed_at_s", CUTS)
async def test_a_loop_that_is_cut_goes_on_where_it_was(killed_at_s: float, masks: bool) -> None:
    """In either turn: an interruption by a new version, then the end of the process, then a restart from the log."""
    scene = Scene(masks=masks)
    assert not await scene.start(interrupted_at_s=killed_at_s - 0.35, killed_at_s=killed_at_s)
    scene.restart()
    stored = restore_samples(0, N, [frame for _, frame in scene.launched().partials])
    assert all(not sample.is_finished for sample in stored)
    assert await scene.start()
    for versions in scene.check():
        at = next(i for i, version in enumerate(versions) if version == 1)
        assert set(versions[:at]) <= {0, NO_VERSION}
        assert set(versions[at:]) <= {1, NO_VERSION}
        assert at == CUTS[killed_at_s]


async def test_a_process_that_dies_without_parking_loses_at_most_one_piece() -> None:
    """The frames stored after each piece and after the tool are enough, whatever the last of them was."""
    whole = Scene()
    assert await whole.start()
    records = list(whole.journal.records)
    partials = [i for i, (kind, _) in enumerate(records) if kind == "partial"]
    assert len(partials) == N * 5, "two pieces a turn that did not end it, and one frame with the tool's answer"
    for cut in partials:
        scene = Scene()
        scene.journal.records = records[: cut + 1]
        scene.restart()
        assert await scene.start()
        scene.check()


class Mute(ScriptedEngine):
    """Never knows the text of what it says, and has to be asked for it; cannot be, until it may speak."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.may_speak = anyio.Event()
        self.was_asked = anyio.Event()

    async def generate(self, request: Any, sink: Any) -> Any:
        end = await super().generate(request, lambda tokens, logprobs, _: sink(tokens, logprobs, ""))
        return type(end)(end.reason, text_complete=False)

    async def detokenize(self, tokens: Sequence[int]) -> str:
        self.was_asked.set()
        await self.may_speak.wait()
        return await super().detokenize(tokens)


async def test_a_sample_that_is_cut_while_its_text_is_asked_for_is_not_finished_without_it() -> None:
    """It was: after the restart it was scored with the text ""."""
    sample = Sample(index=0)
    engine = Mute(name="e", seed=5)
    prompt = list(b"say it")
    async with running_pool(engine) as pool, anyio.create_task_group() as tasks:
        tasks.start_soon(pool.generate, sample, prompt, SAMPLING)
        with anyio.fail_after(DEADLINE_S):
            await engine.was_asked.wait()
        tasks.cancel_scope.cancel()
    assert (sample.is_finished, sample.finish_reason, len(sample.tokens)) == (False, "length", TURN)
    (restored,) = restore_samples(0, 1, [encode_partial(source="s", group_index=0, slot=0, sample=sample, start=0)])
    engine = Mute(name="e", seed=5)
    engine.may_speak.set()
    async with running_pool(engine) as pool:
        await pool.generate(restored, prompt, SAMPLING)
        assert pool.statistics()[0].completed == 0, "nothing is generated again"
    assert restored.is_finished
    assert restored.text == bytes(list(sample.tokens)).decode()
    assert restored.metadata.get("pieces", 1) == 1


@pytest.mark.parametrize("begin", [0, 7])
async def test_a_turn_that_begins_anew_leaves_what_was_before_it(begin: int) -> None:
    """Where partial rollouts are not kept: the turn is let go of, not the sample."""
    version = 0
    sample = Sample(index=0)
    if begin:
        sample.extend([97, 98, 99], [-1.0] * 3, 0)
        sample.append_context(list(b"tool"))
    before = list(sample.tokens)
    engine = ScriptedEngine(name="e", seed=5, chunk=1)
    prompt = list(b"say it")
    async with running_pool(engine, policy_version=lambda: version, chunk_tokens=8, keep_partials=False) as pool:

        async def cut(sample: Sample) -> None:
            nonlocal version
            if version == 0:
                version = 1
                pool.interrupt()

        turn = TurnRequest(sample=sample, prompt_tokens=prompt, sampling=SAMPLING, begin=begin)
        await pool.turn(turn, after_piece=cut)
    said, _ = engine.expected_response([*prompt, *before], SAMPLING, 0)
    assert list(sample.tokens) == before + said
    assert sample.versions == ([[0, 3], [NO_VERSION, 4]] if begin else []) + [[1, TURN]]


async def test_a_stop_of_the_turn_before_does_not_end_the_next_one() -> None:
    """Stop tokens and texts are looked for in what the turn itself says."""
    sampling = SamplingParams(max_new_tokens=40, stop=("END",), stop_token_ids=(33,))
    for context in (b"the END", b"now!"):
        sample = Sample(index=0)
        sample.extend(list(b"EN"), [-1.0] * 2, 0)
        sample.append_context(list(context))
        async with running_pool(ScriptedEngine(name="e", seed=5)) as pool:
            turn = TurnRequest(sample=sample, prompt_tokens=[65], sampling=sampling, begin=sample.turn_begin)
            end = await pool.turn(turn)
        assert len(sample.tokens) == 2 + len(context) + 40
        assert end == ("length", bytes(list(sample.tokens)[2 + len(context) :]).decode(), "e")


def test_the_answers_of_tools_have_no_age() -> None:
    sample = Sample(index=0)
    sample.append_context([1, 2])
    assert (sample.oldest_version, sample.turn_begin, sample.mask()) == (None, 2, b"\0\0")
    sample.extend([3], [-1.0], 4)
    sample.append_context([5])
    assert (sample.oldest_version, sample.turn_begin, sample.mask()) == (4, 4, b"\0\0\1\0")
    assert not is_stale(5, sample.oldest_version, 1)
    assert newest_version(sample.versions) == 4, "what came last is nobody's"
    assert newest_version([[NO_VERSION, 2]]) is None
    with pytest.raises(ValueError, match="must not be empty"):
        sample.append_context([])


async def test_a_stop_text_does_not_begin_in_what_a_tool_said() -> None:
    """Nor is it found there when the turn is gone on with."""
    sample = Sample(index=0)
    sample.append_context(list(b"the EN"))
    sample.extend(list(b"D"), [-1.0], 0)
    sampling = SamplingParams(max_new_tokens=40, stop=("END",))
    async with running_pool(ScriptedEngine(name="e", seed=5)) as pool:
        turn = TurnRequest(sample=sample, prompt_tokens=[65], sampling=sampling, begin=sample.turn_begin)
        end = await pool.turn(turn)
    assert (len(sample.tokens) - sample.turn_begin, end.reason, end.text[0]) == (40, "length", "D")
