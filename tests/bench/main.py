"""The command ``scripts/bench``: runs benchmarks, prints the table, writes JSON and pictures."""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from orchestrator.errors import OrchestratorError
from tests.bench.ending import Interrupts, adopt, end_descendants
from tests.bench.machine import describe, load
from tests.bench.peers import ALL_PEERS, OPTIONAL, USUAL_PEERS
from tests.bench.picture import draw
from tests.bench.result import Options, Result, Unavailable

BENCHMARKS = ("handout", "through", "inflight", "snapshot", "mixture", "waiting", "start", "logging")
ROUNDS = 7
QUICK_ROUNDS = 5


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description="Measures what the daemon costs, against limits of this machine and against what would be used"
        " instead, in one run. How to read the figures: docs/performance.md.",
        epilog="Exit status 1: something was not measured, and it says what and why. A goal that is missed is no error."
        " Example: scripts/bench --quick --only handout --only mixture --json bench.json",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="smaller sizes and fewer rounds: on two quiet cores two minutes and not seven",
    )
    parser.add_argument(
        "--only", action="append", choices=BENCHMARKS, metavar="NAME", help=f"of {', '.join(BENCHMARKS)}"
    )
    parser.add_argument("--sample", action="store_true", help=argparse.SUPPRESS)  # what CI has time for
    parser.add_argument(
        "--peers",
        default=",".join(USUAL_PEERS),
        help=f"of {', '.join(ALL_PEERS)}, separated by commas; none: ''. Default: %(default)s. They run in .venv-peers;"
        f" {', '.join(OPTIONAL)}, each of hundreds of megabytes, in an environment of its own, for through alone",
    )
    parser.add_argument("--rounds", type=int, help=f"of each comparison (default {ROUNDS}, quick {QUICK_ROUNDS})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="write one picture a benchmark there")
    options = parser.parse_args(arguments)
    unknown = set(filter(None, options.peers.split(","))) - set(ALL_PEERS)
    if unknown:
        parser.error(f"no peer {', '.join(sorted(unknown))}; there are {', '.join(ALL_PEERS)}")
    return options


def run_one(name: str, options: Options, interrupts: Interrupts) -> Result:
    """One benchmark, or why it was not measured, whatever went wrong: the others go on."""
    module = importlib.import_module(f".{name}", __package__)
    try:
        result: Result = module.run(options)
    except KeyboardInterrupt:
        why = ""
    except (Unavailable, OrchestratorError) as error:
        why = str(error)
    except Exception as error:  # noqa: BLE001 - whatever it was, it is told and counts as not measured
        traceback.print_exc()
        why = f"{type(error).__name__}: {error}"
    else:
        interrupts.seen()
        return result
    if interrupts.seen():  # also where that ended what was measured before this process had word of it
        why = "it was interrupted"
    return Result(name, module.__doc__.partition("\n")[0], "", "", missing=[why])


def table(result: Result) -> str:
    lines = [f"== {result.name}: {result.title}"]
    if result.figures:
        lines.append(f"   {'':28}{result.size:>14}{'µs ' + result.unit:>26}{'µs of CPU':>14}")
        lines += [f"   {f.contender:28}{f.size:>14g}{f.wall_us:>26,.1f}{f.cpu_us:>14,.1f}" for f in result.figures]
    for goal in result.goals:
        verdict = {True: "met", False: "NOT MET", None: ""}[goal.is_met]
        value = f"{goal.value:,.0f}" if goal.value >= 1000 else f"{goal.value:.3g}"
        lines.append(f"   {goal.what:66} {value:>10}{goal.unit:20} {goal.bound:24} {verdict}".rstrip())
    if result.growth:
        lines.append(f"   growth: {result.growth}")
    lines += [f"   note: {note}" for note in result.notes]
    return "\n".join(lines + [f"   NOT MEASURED: {why}" for why in result.missing])


def as_json(result: Result) -> dict[str, Any]:
    goals = [asdict(goal) | {"is_met": goal.is_met} for goal in result.goals]
    return asdict(result) | {"goals": goals}


def run_all(names: Sequence[str], options: Options, pictures: Path | None, interrupts: Interrupts) -> list[Result]:
    """One after the other, each told when it is done; an interrupt ends the run, and what was measured is kept."""
    results: list[Result] = []
    for name in names:
        folder = Path(tempfile.mkdtemp(prefix=f"bench-{name}-"))
        try:
            begin = time.monotonic()
            result = run_one(name, replace(options, folder=folder), interrupts)
        finally:
            left = end_descendants()
            shutil.rmtree(folder, ignore_errors=True)
        if left:
            result.notes.append(f"processes that it left behind, and that were ended: {left}")
        print(f"\n{table(result)}\n   took {time.monotonic() - begin:.0f} s", flush=True)
        results.append(result)
        if pictures and result.figures:
            draw(result, pictures)
        if interrupts.came:
            break
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 where something was not measured; 0 also where a goal is missed, which a busy machine does."""
    chosen = parse(arguments)
    adopt()
    interrupts = Interrupts()
    peers = tuple(filter(None, chosen.peers.split(",")))
    names = [name for name in BENCHMARKS if not chosen.only or name in chosen.only]
    rounds = chosen.rounds or (QUICK_ROUNDS if chosen.quick else ROUNDS)
    machine = describe(peers if "through" in names else ())
    print("\n".join(f"{key}: {value}" for key, value in machine.items()), flush=True)
    began = time.monotonic()
    options = Options(Path(), chosen.quick, chosen.sample, rounds, peers)
    results = run_all(names, options, chosen.pictures, interrupts)
    goals = [goal for result in results for goal in result.goals if goal.is_met is not None]
    met = sum(bool(goal.is_met) for goal in goals)
    print(f"\n{met} of {len(goals)} goals met in {time.monotonic() - began:.0f} s; {load()}")
    missing = [name for name in names if name not in {result.name for result in results if not result.missing}]
    if missing:
        print(f"not measured, or not all of it: {', '.join(missing)}")
    if chosen.json:
        whole = {"machine": machine, "load_after": load(), "results": [as_json(result) for result in results]}
        chosen.json.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
