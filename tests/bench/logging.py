"""What the lines and metrics of every step cost, and Prometheus asking for them, at a hundred groups a second.

Measured are the daemon's own parts: the metrics of a batch, its lines, the thread that writes them, the history of the
page, the file of metrics; and a scrape of a real daemon, as its CPU time says.
"""

from __future__ import annotations

import os
import urllib.request
from pathlib import Path

import anyio

from orchestrator.client import RolloutClient
from orchestrator.consumer.waits import Waits
from orchestrator.core.filters import RewardCaps
from orchestrator.core.ledger.leases import LeasedBatch
from orchestrator.core.ledger.ledger import Ledger, SourceSize
from orchestrator.core.mixture.mixer import Mixer, MixerSettings
from orchestrator.core.weights.forms import parse_weight
from orchestrator.core.weights.table import WeightTable
from orchestrator.daemon.step_log import StepLog
from orchestrator.logs import configure_logging
from orchestrator.sinks import build_feeds
from orchestrator.status import StepHistory, StepMetrics
from tests.bench.daemons import ROWS, daemon, free_port, write_config
from tests.bench.measure import Taken, cpu, exponent, interleave, wall, watched
from tests.bench.mixture import expression
from tests.bench.result import Figure, Goal, Options, Result
from tests.bench.work import GROUPS_A_BATCH, SAMPLES, SMALL, Maker
from tests.support.builders import MemoryJournal

SIZES = (2, 16, 64)
BATCHES = 60
GROUPS_A_SECOND = 100
SCRAPE_EVERY_S = 15
SCRAPES = 10


class Steps:
    """Batches of a real ledger and mixer, of which the lines are written again and again."""

    def __init__(self, sources: int, folder: Path) -> None:
        names = [f"source-{i}" for i in range(sources)]
        self._folder = folder
        self._ledger = Ledger({name: SourceSize(ROWS) for name in names}, nonce="n")
        self._table = WeightTable(names, [parse_weight(expression(i)) for i in range(sources)])
        self._caps = RewardCaps(names, None)
        self._batches: list[LeasedBatch] = []
        journal, maker = MemoryJournal(self._ledger), Maker(SMALL)
        mixer = Mixer(
            ledger=self._ledger,
            journal=journal,
            table=self._table,
            settings=MixerSettings(batch_size=GROUPS_A_BATCH, lookahead=1, outstanding_bound=10 * GROUPS_A_BATCH),
        )
        for _ in range(BATCHES):
            for name, count in mixer.plan()[0].counts.items():
                for _ in range(count):
                    event = self._ledger.next_launch(name, SAMPLES, lambda _, position: position)
                    assert event is not None
                    journal.record(event)
                    journal.store_group(maker.frame(name, event.group_index, event.prompt_index))
            batch = mixer.form(1)
            assert isinstance(batch, LeasedBatch)
            self._batches.append(batch)

    def turn(self) -> Taken:
        return anyio.run(self._turn)

    async def _turn(self) -> Taken:
        logs = configure_logging(file=self._folder / "steps.jsonl", level="info")
        [feed] = build_feeds([], run="bench", state_dir=self._folder, log=logs.logger("metrics"), file=(1 << 26, 1))
        log = StepLog(
            metrics=StepMetrics(self._ledger, self._caps.cap),
            table=self._table,
            caps=self._caps,
            waits=Waits(),
            history=StepHistory(),
            feeds=[feed],
            logs=logs,
            log=logs.logger("mixer"),
        )
        async with anyio.create_task_group() as tasks:
            await tasks.start(feed.run)
            with watched() as watch:
                for batch in self._batches:
                    log.batch_formed(batch)
                await feed.close()  # when these return everything is written
                logs.close()
        os.unlink(self._folder / "steps.jsonl")
        return watch.taken(BATCHES)


def scrape(sources: int, folder: Path, rounds: int) -> list[Taken]:
    """Of a real daemon with so many sources, each of which has handed out groups."""
    port = free_port()
    folder.mkdir()
    weights: dict[str, float | str] = {f"source-{i}": expression(i) for i in range(sources)}
    config = write_config(folder, weights=weights, status={"http": f"127.0.0.1:{port}"}, sampling={"max_new_tokens": 8})
    results = []
    with daemon(config) as pid, RolloutClient(folder / "sock", connect_timeout_s=30) as client:
        client.ack(client.get_batch(timeout_s=30).lease)
        while client.status()["generation"]["in_flight"]:
            pass
        for _ in range(rounds):
            with watched(pid) as watch:
                for _ in range(SCRAPES):
                    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
                        answer.read()
            results.append(watch.taken(SCRAPES))
    return results


def run(options: Options) -> Result:
    result = Result("logging", "Lines and metrics of every step", "a step, or a scrape", "sources")
    rounds = interleave({str(n): Steps(n, options.folder).turn for n in SIZES}, options.rounds)
    for sources in SIZES:
        lines, scrapes = rounds[str(sources)], scrape(sources, options.folder / f"{sources}", options.rounds)
        for name, taken in (("lines and metrics", lines), ("scrape, with the asking", scrapes)):
            result.figures.append(Figure(name, sources, wall(taken), cpu(taken)))
        busy = cpu(lines) * GROUPS_A_SECOND / GROUPS_A_BATCH + cpu(scrapes) / SCRAPE_EVERY_S
        what = f"logging and metrics at {GROUPS_A_SECOND} groups/s, {sources} sources"
        result.goals.append(Goal(what, busy / 1e4, " % of a core", at_most=2))
    points = [(figure.size, figure.cpu_us) for figure in result.figures if figure.contender == "lines and metrics"]
    result.growth = (
        f"CPU time of a step's lines grows as sources^{exponent(points):.2f}, from {SIZES[0]} to {SIZES[-1]}"
    )
    return result
