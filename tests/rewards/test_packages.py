"""Rewards and prompts of other people's packages; skipped where these are not installed.

To run all of it: ``pip install -e '.[rewards]'``.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli import main
from orchestrator.cli.exit_codes import BAD_CONFIG
from orchestrator.errors import PromptFileError, PromptUnavailable, RewardError, RewardTimeout
from orchestrator.prompts import PromptSource
from orchestrator.prompts.reasoning import source as reasoning
from orchestrator.records import Prompt, Sample, SampleStatus
from orchestrator.rewards import Reward, RewardResult
from orchestrator.rewards.builtin.reasoning import extract_answer
from tests.rewards.test_builtin import score
from tests.support.daemon_process import daemon, write_config
from tests.support.specs import PROMPTS, build_reward, open_prompts

pytestmark = pytest.mark.timeout(120)


def needs(module: str) -> pytest.MarkDecorator:
    absent = importlib.util.find_spec(module) is None
    return pytest.mark.skipif(absent, reason=f"{module} is not installed: pip install -e '.[rewards]'")


@asynccontextmanager
async def reward_of(name: str, **options: Any) -> AsyncIterator[Reward]:
    reward = build_reward(name, **options)
    try:
        yield reward
    finally:
        await reward.aclose()


def said(text: str) -> Sample:
    return Sample(index=0, text=text, status=SampleStatus.COMPLETED)


# -- without the packages ---------------------------------------------------------------------------------------------

WITHOUT = """
import sys, importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in ("math_verify", "reasoning_gym") else found(name, *rest)
from orchestrator.cli import main
sys.exit(main(["check", sys.argv[1]]))
"""


def test_check_says_what_to_install(tmp_path: Path) -> None:
    sources = [
        {"name": "easy", "prompts": {"path": "easy.jsonl"}, "reward": "math_verify"},
        {"name": "hard", "prompts": {"path": "reasoning_gym:chain_sum"}},
    ]
    config = write_config(tmp_path, data_sources=sources)
    answer = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(config)], capture_output=True, text=True, check=False, timeout=60
    )
    assert answer.returncode == BAD_CONFIG
    install = "pip install 'rollout-orchestrator[rewards]'"
    lines = [line.partition(": ")[2] for line in answer.stderr.splitlines()]
    assert sorted(lines) == [
        f"data_sources[0].reward: math_verify needs the package math-verify: {install}",
        f"data_sources[1].prompts.path: reasoning_gym:chain_sum: it needs the package reasoning-gym: {install}",
        f"data_sources[1].reward: reasoning_gym needs the package reasoning-gym: {install}",
    ]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("42", "42"),
        ("  it is 42\n", "it is 42"),
        ("so <answer> 42 </answer> done", "42"),
        ("<answer>1</answer> no, <answer>2</answer>", "2"),
        ("so <answer>42", "42"),
        ("<answer></answer>", ""),
        ("</answer> 3", "</answer> 3"),
        ("<answer>a\nb</answer>", "a\nb"),
        ("", ""),
    ],
)
def test_where_an_answer_stands(text: str, answer: str) -> None:
    assert extract_answer(text) == answer


# -- math_verify ------------------------------------------------------------------------------------------------------

MATHEMATICS = {
    ("1/2", "It is $0.5$."): 1.0,
    ("1/2", r"so \boxed{\frac{2}{4}}"): 1.0,
    (r"\frac{1}{2}", "0.5"): 1.0,
    (r"$\frac{1}{2}$", "0.25"): 0.0,
    (42, "The answer is 42"): 1.0,
    (0.5, r"\boxed{1/2}"): 1.0,
    ("x^2+1", "$1 + x^2$"): 1.0,
    (r"10\sqrt{2}", r"\boxed{10}"): 0.0,
    (r"10\sqrt{2}", r"\boxed{\sqrt{200}}"): 1.0,
    ("42", "I do not know"): 0.0,
    ("42", ""): 0.0,
}
NO_MATHEMATICS: list[Any] = [None, True, [], {}, "", "   "]
"""Labels."""


@needs("math_verify")
async def test_mathematics() -> None:
    async with reward_of("math_verify") as reward:
        for (label, text), value in MATHEMATICS.items():
            result = await score(reward, said(text), Prompt("m", 0, 0, "?", label))
            assert result == RewardResult(value), (label, text)
        for label in NO_MATHEMATICS:  # an error, and not zero
            with pytest.raises(RewardError, match=r"reward math_verify: .*the label of prompt 3 of source m"):
                await score(reward, said("1"), Prompt("m", 3, 0, "?", label))
        assert (reward.statistics().scored, reward.statistics().failed) == (len(MATHEMATICS), len(NO_MATHEMATICS))
        assert reward.statistics().extra["processes_started"] == 1


@needs("math_verify")
async def test_mathematics_without_end_is_killed() -> None:
    async with reward_of("math_verify", timeout_s=1.0) as reward:
        endless = "$3^{10^{9}}$"
        with pytest.raises(
            RewardTimeout, match="reward math_verify: no answer within 1 s; its worker process was killed"
        ):
            await score(reward, said(endless), Prompt("m", 0, 0, "?", "3^{10^{9}+1}"))
        assert await score(reward, said("2"), Prompt("m", 0, 0, "?", "2")) == RewardResult(1.0)


# -- reasoning_gym ----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def task(name: str, *, run_seed: int = 0, **keys: Any) -> AsyncIterator[PromptSource]:
    spec = PROMPTS.validate_python({"path": f"reasoning_gym:{name}", **keys})
    source = await spec.open(name="puzzles", seed=run_seed)
    try:
        yield source
    finally:
        await source.aclose()


# Of the plain kind, of those that go through sets, whose judgement looks into tuples, or that have no answer to show.
TASKS = ["chain_sum", "word_ladder", "polynomial_multiplication", "rearc", "arc_agi", "graph_color", "list_functions"]


@needs("reasoning_gym")
@pytest.mark.parametrize("name", TASKS)
async def test_an_entry_is_the_same_whenever_and_wherever_it_is_made(name: str) -> None:
    async with task(name, size=40, seed=5) as source:
        forward = [await source.read(index, 0) for index in range(4)]
    async with task(name, size=40, seed=5) as source:
        backward = [await source.read(index, 0) for index in (17, 3, 2, 1, 0)][:0:-1]
        assert backward == forward
        assert await source.read(1, 2) == Prompt(
            "puzzles", 1, 2, forward[1].content, forward[1].label, forward[1].metadata
        )
        assert len({str(prompt.content) for prompt in forward}) > 1


@needs("reasoning_gym")
@pytest.mark.parametrize("name", [name for name in TASKS if name != "graph_color"])
async def test_a_task_scores_its_own_answers(name: str) -> None:
    async with task(name, size=40, seed=5) as source, reward_of("reasoning_gym") as reward:
        for index in range(3):
            prompt = await source.read(index, 0)
            assert (await score(reward, said(f"I think: <answer>{prompt.label}</answer>"), prompt)).value == 1.0
            assert (await score(reward, said(""), prompt)).value < 1.0


@needs("reasoning_gym")
async def test_an_answer_that_a_task_cannot_read_is_wrong_and_says_why() -> None:
    async with task("prime_factorization", size=5) as source, reward_of("reasoning_gym") as reward:
        result = await score(reward, said("no idea"), await source.read(0, 0))
        assert result.value == 0.0
        assert result.detail is not None
        assert "ValueError" in result.detail["raised"]


@needs("reasoning_gym")
async def test_a_prompt_that_is_no_entry_is_an_error() -> None:
    async with reward_of("reasoning_gym") as reward:
        with pytest.raises(RewardError, match="prompt 3 of source easy is not of a source"):
            await score(reward, said("1"), Prompt("easy", 3, 0, "1+0=", "1"))


@needs("reasoning_gym")
async def test_seeds_sizes_and_options() -> None:
    async with task("chain_sum", size=7, seed=1, epochs=2, options={"min_terms": 5, "max_terms": 5}) as source:
        assert (len(source), source.epochs, source.name) == (7, 2, "puzzles")
        assert sorted(source.row_at(0, position) for position in range(7)) == list(range(7))
        first = await source.read(0, 0)
        assert str(first.content).count("+") + str(first.content).count("-") == 4
        with pytest.raises(IndexError, match="no entry 7"):
            await source.read(7, 0)
    async with task("chain_sum", run_seed=1, seed=2) as other:
        assert len(other) == 10_000
        assert (await other.read(0, 0)).content != first.content
        assert other.row_at(0, 0) != 0 or other.row_at(0, 1) != 1


@needs("reasoning_gym")
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("chain_sums", {}, "no task 'chain_sums'; did you mean chain_sum?"),
        ("chain_sum", {"terms": 3}, "takes no such options: .*it has .*min_terms"),
        ("chain_sum", {"min_terms": 0}, "refuses its options"),
        ("chain_sum", {"min_terms": "many"}, "options"),
        ("composite", {}, "refuses its options"),
    ],
)
async def test_what_is_no_task(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(PromptFileError, match=f"reasoning_gym:{name}: .*{message}"):
        await open_prompts(name="x", path=f"reasoning_gym:{name}", options=options)


@needs("reasoning_gym")
async def test_an_entry_that_takes_for_ever_costs_its_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    async with task("chain_sum", size=5) as source:
        assert await source.read(1, 0)
    monkeypatch.setattr(reasoning, "ENTRY_TIMEOUT_S", 1e-9)
    with pytest.raises(PromptFileError, match=r"entry 0 of reasoning_gym:chain_sum cannot be made: no answer within"):
        async with task("chain_sum", size=5):
            pass
    assert issubclass(PromptUnavailable, RuntimeError)


@needs("reasoning_gym")
def test_a_source_that_scores_itself_in_a_real_daemon(tmp_path: Path) -> None:
    sources = [
        {"name": "easy", "prompts": {"path": "easy.jsonl"}, "reward": "contains"},
        {"name": "puzzles", "prompts": {"path": "reasoning_gym:chain_sum", "size": 20, "options": {"max_terms": 3}}},
    ]
    config = write_config(tmp_path, data_sources=sources, data_source_weights=[1, 1])
    assert main(["check", str(config)]) == 0
    with daemon(config) as process:
        seen = {}
        for _ in range(2):
            with process.connect() as client:
                for _ in range(4):
                    batch = client.get_batch(timeout_s=60)
                    for group in batch.groups:
                        if group.source == "puzzles":
                            made = group.metadata["reasoning_gym"]
                            assert made == {"task": "chain_sum", "seed": 3, "size": 20, "options": {"max_terms": 3}}
                            assert seen.setdefault(group.prompt_index, group.prompt) == group.prompt
                            assert all(0 <= sample.reward < 1 for sample in group.samples)
                    client.ack(batch.lease)
                assert client.status()["sources"]["puzzles"]["reward"]["name"] == "reasoning_gym"
            process.kill()
            process.start()
        assert len(seen) >= 10
