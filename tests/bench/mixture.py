"""Mixture arithmetic: weights, counts and plan of a step, and one lambda; held against what a plain script would do.

The plain script evaluates the same curves as Python functions, normalises them and draws the batch's sources by
``random.choices``: no exact counts, no carry, no look-ahead.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from orchestrator.core.mixture.plan import PlannedBatch, forecast
from orchestrator.core.weights.forms import parse_weight
from orchestrator.core.weights.table import WeightTable
from tests.bench.measure import Taken, cpu, cpu_ratio, exponent, interleave, wall, watched
from tests.bench.result import Figure, Goal, Options, Result
from tests.bench.work import GROUPS_A_BATCH, demand

SIZES = (16, 64, 256)
LOOKAHEAD = 2
STEPS = 200
CALLS = 20_000


def expression(i: int) -> str:
    """The weight of source i: no two are alike."""
    return f"lambda step: {1 + i} + {0.5 + i % 7} * min(step / {200 + i}, 1.0)"


def planner(sources: int) -> Callable[[], Taken]:
    names = [f"source-{i}" for i in range(sources)]
    table = WeightTable(names, [parse_weight(expression(i)) for i in range(sources)])
    at = [0]
    carry = dict.fromkeys(names, 0.0)
    plan: tuple[PlannedBatch, ...] = ()

    def turn() -> Taken:
        nonlocal carry, plan
        with watched() as watch:
            for step in range(at[0], at[0] + STEPS):
                plan = forecast(
                    table,
                    step=step,
                    carry=carry,
                    size=GROUPS_A_BATCH,
                    horizon=LOOKAHEAD,
                    active=names,
                    debt=carry_none,
                    earlier=plan,
                )
                demand(plan)
                carry = plan[0].carry
        at[0] += STEPS
        return watch.taken(STEPS)

    carry_none = dict.fromkeys(names, 0.0)
    return turn


def plain(sources: int) -> Callable[[], Taken]:
    curves = [eval(expression(i)) for i in range(sources)]
    draw = random.Random(0)

    def turn() -> Taken:
        with watched() as watch:
            for step in range(STEPS):
                weights = [curve(step) for curve in curves]
                total = sum(weights)
                draw.choices(range(sources), [weight / total for weight in weights], k=GROUPS_A_BATCH)
        return watch.taken(STEPS)

    return turn


def calls(function: Callable[[int], float]) -> Callable[[], Taken]:
    def turn() -> Taken:
        with watched() as watch:
            for step in range(CALLS):
                function(step)
        return watch.taken(CALLS)

    return turn


def run(options: Options) -> Result:
    result = Result("mixture", "Weights, counts and plan of a step", "a step", "sources")
    for sources in SIZES:
        rounds = interleave({"planned": planner(sources), "plain script": plain(sources)}, options.rounds)
        result.figures += [Figure(name, sources, wall(taken), cpu(taken)) for name, taken in rounds.items()]
        if sources == 64:
            value = cpu(rounds["planned"])
            result.goals.append(Goal("weights, counts and plan, 64 sources", value, " µs of CPU a step", at_most=200))
            result.goals.append(
                Goal("weights, counts and plan, of a plain script", cpu_ratio(rounds, "planned", "plain script"), " x")
            )
    ours, python = parse_weight(expression(3)), eval(expression(3))
    rounds = interleave({"lambda": calls(ours), "Python": calls(python)}, options.rounds)
    result.goals.append(Goal("a lambda of the config", cpu(rounds["lambda"]), " µs of CPU", at_most=3))
    result.goals.append(Goal("a lambda, of Python's own", cpu_ratio(rounds, "lambda", "Python"), " x"))
    points = [(figure.size, figure.cpu_us) for figure in result.figures if figure.contender == "planned"]
    result.growth = f"CPU time a step grows as sources^{exponent(points):.2f}, from {SIZES[0]} to {SIZES[-1]}"
    return result
