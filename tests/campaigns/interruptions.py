"""A real daemon whose generations are interrupted at random moments, until every prompt has ended exactly once.

Three kinds of engines: ``fake`` (SGLang and vLLM fakes, in processes that are killed and started again), ``scripted``
(with faults of their own), ``real`` (a llama.cpp server, greedy). Interruptions are version changes, pauses, deaths and
stalls of engines, and the daemon's own ends: a drain, SIGTERM, SIGKILL. Moments are counted in tokens, not in seconds.
Run it by ``scripts/torture/interruptions``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Final

import anyio

from orchestrator.engines import SamplingParams, ScriptedEngine
from orchestrator.engines.embedded.tiny_model import write_tiny_model
from tests.campaigns.checks import Failure, Taken, arguments, must, scratch
from tests.campaigns.exact import play
from tests.campaigns.farm import Farm, Server
from tests.campaigns.journals import LENGTH, LIMIT, Journals
from tests.campaigns.storm import CUTS, ENDS, FAKES, SAMPLES, Storm
from tests.daemon.test_real_engine import score, scoring_server
from tests.support.daemon_process import write_config, write_prompts
from tests.support.engine_time import JUMPING
from tests.support.fake_server import text_of

SOURCES: Final = ("maths", "code", "talk")
SLOTS: Final = 12
STALL_S: Final = 0.5


SCRIPTED: Final[dict[str, Any]] = {"seed": 5, "tokens_per_s": 150.0, "length": list(LENGTH)}
PRECISION: Final = 5e-3
"""Of a real server's log-probabilities, whose cache has 16 bits. Another context makes them differ by far more."""


FAULTS: Final = {"failure_rate": 0.05, "reset_rate": 0.1, "hang_rate": 0.02}


def config(folder: Path, prompts: int, *, masks: bool, **changes: Any) -> Path:
    for name in SOURCES:
        write_prompts(folder / f"{name}.jsonl", prompts // len(SOURCES), text=name)
    return write_config(
        folder,
        rollout={
            "rollout_batch_size": 3,
            "n_samples_per_prompt": SAMPLES,
            "lookahead": 4,
            "mask_offpolicy_in_partial_rollout": masks,
        },
        engine_defaults={"stall_s": STALL_S, "max_retries": 20},
        data_sources=[
            {"name": name, "prompts": {"path": f"{name}.jsonl", "epochs": 1}, "reward": "contains"} for name in SOURCES
        ],
        data_source_weights=[1, 1, 1],
        **{"sampling": {"max_new_tokens": LIMIT}} | changes,
    )


def rows(cuts: int, kinds: Sequence[str]) -> int:
    """Prompts that it takes for so many interruptions; a multiple of the sources, and of a batch.

    A sample is interrupted four times or so, but not those of the beginning, in which each kind happens once: of these
    there is a batch for each kind (:class:`~tests.campaigns.storm.Storm`).
    """
    return (len(kinds) + round(cuts / 2.5 / SAMPLES / len(SOURCES))) * len(SOURCES)


def run_fake(folder: Path, *, cuts: int, seed: int, masks: bool = True) -> Storm:
    """SGLang and vLLM fakes."""
    kinds = (*CUTS, *ENDS, *FAKES)
    prompts = rows(cuts, kinds)
    with ExitStack() as stack:
        how = {"length": LENGTH, "tokens_per_s": 150.0}
        farms = []
        for kind, more in (("sglang", {"incremental": bool(seed % 2)}), ("openai", {})):
            server = Server(name=f"{kind}-{len(farms)}", kind=kind, how=how | more)
            farms.append(stack.enter_context(Farm(server, journal=folder / f"{server.name}.journal")))
        specs = [server.config(max_in_flight=SLOTS * 3 // 2) for farm in farms for server in farm.servers.values()]
        path = config(folder, prompts, masks=masks, engines=specs)
        storm = Storm(path, kinds, seed, gap_tokens=250.0, cuts=cuts, farms=farms)
        storm.run()
    journals = Journals([farm.journal for farm in farms if farm.journal is not None], storm.changes, storm.kills)
    storm.check(prompts, journals.problem, masks=masks)
    # An end that was on its way when its connection was cut is generated again; complete samples are not.
    must(
        journals.again <= max(2, storm.trainer.cuts // 50), f"{journals.again} complete responses were generated again"
    )
    must(journals.lost() <= max(2, storm.trainer.cuts // 50), f"the tokens of {journals.lost()} responses were lost")
    return storm


def run_scripted(folder: Path, *, cuts: int, seed: int, masks: bool = False) -> Storm:
    """Scripted engines."""
    prompts = rows(cuts, (*CUTS, *ENDS))
    names = ("one", "two")
    specs = [{"kind": "scripted", "name": name, "max_in_flight": SLOTS} | SCRIPTED | FAULTS for name in names]
    storm = Storm(
        config(folder, prompts, masks=masks, engines=specs), (*CUTS, *ENDS), seed, gap_tokens=350.0, cuts=cuts
    )
    storm.run()
    script = ScriptedEngine(name="script", **SCRIPTED | {"length": LENGTH})
    sampling = SamplingParams(max_new_tokens=LIMIT)

    def problem(sample: Taken) -> str | None:
        tokens, logprobs = script.expected_response(sample.prompt, sampling, sample.index)
        if sample.tokens != tokens:
            return f"other tokens than the engine's: {sample.tokens}, {tokens}"
        near = all(abs(a - b) < 1e-5 for a, b in zip(sample.logprobs, logprobs, strict=True))
        return None if near else "other log-probabilities than the engine's"

    storm.check(prompts, problem, masks=masks)
    return storm


def run_real(folder: Path, *, cuts: int, seed: int, tokens: int = 300) -> Storm:
    """A llama.cpp server, greedy: the same run without interruptions says what is right.

    Where two tokens are equally likely to the precision of the server's cache (16 bits), either may follow: what was
    computed at once and what was computed token by token are rounded differently. A third server says where that is so.
    """
    prompts = rows(cuts, (*CUTS, *ENDS))
    model = folder / "model.gguf"
    write_tiny_model(model)
    embedded = {"kind": "embedded", "name": "real", "model": str(model), "slots": SLOTS, "threads": 1}
    greedy = {"max_new_tokens": tokens, "temperature": 0.0}
    whole: dict[str, Taken] = {}
    storms = []
    for name, kinds in (("whole", ()), ("cut", (*CUTS, *ENDS))):
        (folder / name).mkdir()
        path = config(folder / name, prompts, masks=False, engines=[embedded], sampling=greedy)
        storms.append(Storm(path, kinds, seed, gap_tokens=300.0 if kinds else math.inf, cuts=cuts if kinds else 0))
        storms[-1].run()
        whole = whole or {text_of(sample.prompt): sample for sample in storms[0].trainer.samples}
    ties = 0

    def problem(sample: Taken) -> str | None:
        nonlocal ties
        other = whole[text_of(sample.prompt)]
        same = next(
            (i for i, (a, b) in enumerate(zip(sample.tokens, other.tokens, strict=False)) if a != b), len(sample.tokens)
        )
        if not all(abs(a - b) < PRECISION for a, b in zip(sample.logprobs[:same], other.logprobs[:same], strict=True)):
            return "other log-probabilities than without an interruption"
        if same < len(sample.tokens):
            prefix = [*sample.prompt, *sample.tokens[:same]]
            one, two = (score(url, prefix, tokens[same]) for tokens in (sample.tokens, other.tokens))
            if abs(one - two) >= PRECISION:
                return f"another token at {same} of {len(other.tokens)} than without an interruption"
            ties += 1
        elif len(sample.tokens) != len(other.tokens):
            return f"{len(sample.tokens)} tokens, {len(other.tokens)} without an interruption"
        return None

    with scoring_server(model, 2 * tokens) as url:
        for storm in storms:
            storm.check(prompts, problem, masks=False)
    must(ties <= len(whole) * SAMPLES // 8, f"{ties} ties")
    must(storms[0].trainer.cuts == 0, "the run that nobody interrupted was interrupted")
    return storms[1]


def run_exact(*, cuts: int, seed: int) -> tuple[int, Counter[str]]:
    """In this process, see :mod:`tests.campaigns.exact`."""
    total, events = 0, Counter[str]()
    for number, has_faults in enumerate((False, True)):
        scene = anyio.run(
            partial(play, seed=seed + number, rows=max(4, cuts // 80), has_faults=has_faults, masks=True),
            backend_options=dict(JUMPING),
        )
        total += scene.check()
        events.update(scene.events)
    return total, events


def main() -> None:
    options = arguments(__doc__ or "", count=2000)
    total, events = run_exact(cuts=options.count, seed=options.seed)
    print(f"in one process, exact to the token: {total} generations were interrupted; {dict(events)}", flush=True)
    failed = False
    for run, share in ((run_fake, 1.0), (run_scripted, 0.5), (run_real, 0.2)):
        try:
            with scratch() as folder:
                storm = run(folder, cuts=int(options.count * share), seed=options.seed)
                print(f"{run.__name__[4:]}: {storm}", flush=True)
        except Failure as failure:
            failed = True
            print(f"{run.__name__[4:]}: {failure}", flush=True)
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
