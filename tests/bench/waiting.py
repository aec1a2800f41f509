"""How long the trainer waits, and what is generated for nothing: by the plan, by equal buffers, one batch at a time.

The real producers, pool, scripted engine, mixer and ledger on a clock that jumps (``campaigns/plan_comparison``):
seconds are the engine's and the trainer's own, so that nothing of it depends on the machine. Lengths are long-tailed
(lognormal, sigma 1), the mixture crosses over from a source of at most 200 tokens to one of at most 1,600.
"""

from __future__ import annotations

import statistics
import time

from tests.bench.measure import exponent
from tests.bench.result import Figure, Goal, Options, Result
from tests.campaigns.plan_comparison import WAYS, Outcome, Scenario, compare, when_asked

SIZES = (8, 16, 32)
SAMPLE_SIZES = (4, 8, 16)
STANDARD_SIZE = 16
STEPS = 60
QUICK_STEPS = 25
SEEDS, QUICK_SEEDS = (1, 2, 3, 4, 5), (1, 2, 3)
ALL_WAYS = {**WAYS, "one batch at a time": when_asked}


def scenario(batch_size: int, steps: int) -> Scenario:
    """A crossing that takes two thirds of the run; engine slots for the samples of four batches."""
    rising = f"min(step / {2 * steps // 3}, 1.0)"
    return Scenario(
        weights={"easy": f"lambda step: 0.9 - 0.8 * {rising}", "hard": f"lambda step: 0.1 + 0.8 * {rising}"},
        longest={"easy": 200, "hard": 1600},
        dropped={"easy": 0.0, "hard": 0.0},
        batch_size=batch_size,
        lookahead=2,
        max_staleness=4,
        in_flight=8 * batch_size,
        length=(100, 100),
        tail=1.0,
    )


def idle(outcome: Outcome) -> float:
    return outcome.waited_s / outcome.took_s


def run(options: Options) -> Result:
    result = Result("waiting", "The trainer's waiting, in the engine's own time", "waited a step", "groups a batch")
    result.is_of_waits = True
    steps = QUICK_STEPS if options.quick else STEPS
    waits: dict[str, list[tuple[float, float]]] = {name: [] for name in ALL_WAYS}
    seeds = SEEDS[:1] if options.is_sample else QUICK_SEEDS if options.quick else SEEDS
    sizes = SAMPLE_SIZES if options.is_sample else SIZES
    for size in sizes:
        began, outcomes = time.process_time(), []
        for seed in seeds[: 1 if options.quick and size != STANDARD_SIZE else None]:
            outcomes.append(compare(steps, seed, scenario=scenario(size, steps), ways=ALL_WAYS))
        cost = 1e6 * (time.process_time() - began) / (steps * len(outcomes) * len(ALL_WAYS))
        for name in ALL_WAYS:
            waited = statistics.median(outcome[name].waited_s for outcome in outcomes)
            waits[name].append((size, waited))
            result.figures.append(Figure(name, size, 1e6 * waited / steps, cost))
        if size == STANDARD_SIZE:
            result.goals += goals(outcomes)
    slopes = ", ".join(f"{name} groups^{exponent(points):.2f}" for name, points in waits.items())
    result.growth = f"waiting grows with the batch, from {sizes[0]} to {sizes[-1]} groups: {slopes}"
    result.notes.append("CPU time is of simulating a step, and the same for all ways: the goals are shares of time")
    return result


def goals(outcomes: list[dict[str, Outcome]]) -> list[Goal]:
    """Medians over the seeds, in each of which all ways had the same prompts and lengths."""

    def ratio(other: str) -> float:
        return statistics.median(idle(o["plan"]) / max(idle(o[other]), 1e-9) for o in outcomes)

    plans = [outcome["plan"] for outcome in outcomes]
    wasted = statistics.median(plan.wasted / plan.trained for plan in plans)
    equal = statistics.median(o["equal buffers"].wasted / o["equal buffers"].trained for o in outcomes)
    return [
        Goal("idle share of the trainer", 100 * statistics.median(map(idle, plans)), " %"),
        Goal("the same, of one batch at a time", ratio("one batch at a time"), " x", at_most=0.5),
        Goal("the same, of equal buffers", ratio("equal buffers"), " x", at_most=0.999),
        Goal("groups generated for nothing", 100 * wasted, " %", at_most=1),
        Goal("the same with equal buffers", 100 * equal, " %"),
        Goal("mean staleness", statistics.median(plan.staleness for plan in plans), " versions"),
    ]
