"""Stalls of a real daemon, each made to happen: the cause is said in one sentence, everywhere, in time, once (G8).

Everywhere: in the trainer's error, in the status, in the log, at a terminal, and on the page in a real browser, where
there is one.
"""

from __future__ import annotations

import itertools
import re
import resource
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli.screen import render_screen
from orchestrator.consumer.starvation import FIRST_WORD_S
from orchestrator.errors import BatchTimeout
from tests.daemon.test_regressions import put_reward
from tests.support.browser import Browser, Tab, free_port
from tests.support.daemon_process import DaemonProcess, daemon, write_config, write_prompts

pytestmark = pytest.mark.timeout(120)

IMPATIENT = {"starvation": {"policy": "wait", "patience_s": 0}}
"""The watchdog looks as often as it may: every FIRST_WORD_S."""

WAITED = re.compile(r"waiting \d+ s for a batch: ")
DEADLINE_S = 30.0


SAID = """() => {
    const said = document.getElementById('headline');
    return [said.textContent, said.dataset.level, parseFloat(getComputedStyle(said).fontSize)];
}"""
LARGE_PX = 24


class Stalls:
    """A trainer that asks, somebody who looks on by another connection, and somebody who has the page open."""

    def __init__(self, process: DaemonProcess, tab: Tab | None) -> None:
        self.process = process
        self.trainer = process.connect()
        self.person = process.connect()
        self.tab = tab
        self._pool = ThreadPoolExecutor(1)

    def close(self) -> None:
        self.trainer.close()
        self.person.close()
        self._pool.shutdown()

    def told(self) -> list[dict[str, Any]]:
        """What the watchdog has said so far."""
        return [line for line in self.process.log if WAITED.match(line["message"])]

    def empty(self) -> None:
        """Take what is there, until a batch does not come at once."""
        while True:
            try:
                self.trainer.ack(self.trainer.get_batch(timeout_s=0.05).lease)
            except BatchTimeout:
                return

    def is_on_page(self, words: tuple[str, ...]) -> bool:
        return self.tab is None or has(self.tab.evaluate(SAID)[0], words)

    def is_late_in_large_letters(self) -> None:
        """While somebody waits, and has for a while."""
        text, level, size = "", "", 0.0
        while self.tab is not None and level != "late":
            waits = self._pool.submit(self.trainer.get_batch, timeout_s=2.2 * FIRST_WORD_S)
            while not waits.done() and level != "late":
                text, level, size = self.tab.evaluate(SAID)
            assert isinstance(waits.exception(), BatchTimeout)
        assert self.tab is None or (size >= LARGE_PX and re.match(r"The trainer has been waiting for \d+ s\. ", text))

    def says(self, *words: str, meanwhile: Callable[[], object] | None = None) -> dict[str, Any]:
        """Somebody waits; the cause has these words in the error, `status`, `top`, the page and the log.

        Returns the status. ``meanwhile`` is done again and again while the trainer waits, which may get batches.
        """
        before, began, lag_s = len(self.told()), time.time(), 0.0
        status: dict[str, Any] = {}
        on_page, seen_at, round_trip_s = False, 0.0, 0.0
        while True:
            waits, asked = self._pool.submit(self.trainer.get_batch, timeout_s=1.3 * FIRST_WORD_S), time.time()
            while not waits.done():
                if meanwhile is not None:
                    meanwhile()
                looked = time.time()
                seen = self.person.status(history=5)
                round_trip_s = max(round_trip_s, time.time() - looked)
                if seen["cause"] and has(seen["cause"]["sentence"], words):
                    status, seen_at = seen, seen_at or time.time()
                on_page = on_page or self.is_on_page(words)
                time.sleep(0.05)  # between looks, not instead of one
            lag_s += max(0.0, time.time() - asked - 1.3 * FIRST_WORD_S)  # of a machine with other things to do
            assert time.time() < began + DEADLINE_S, (
                waits.exception(),
                self.told()[before:],
                status.get("cause"),
                on_page,
            )
            if meanwhile is not None and waits.exception() is None:
                self.trainer.ack(waits.result().lease)
                continue
            error = waits.exception()
            assert isinstance(error, BatchTimeout), error
            said = [line for line in self.told()[before:] if has(line["message"], words)]
            if said and status and on_page and has(str(error), words):
                break
        assert has(str(error.data["cause"]["sentence"]), words)
        assert has(status["headline"]["text"], words)
        screen = " ".join(line.plain.strip() for line in render_screen(status, 400, 40))
        assert has(screen, words), "at a terminal that is wide enough for the sentence"
        assert said[0]["cause"]["kind"] == status["cause"]["kind"]
        told = datetime.fromisoformat(said[0]["@timestamp"]).timestamp()
        allowed_s = 2 * FIRST_WORD_S + lag_s + round_trip_s
        assert told - seen_at < allowed_s, ("within two periods of the watchdog", self.told()[before:])
        kinds = [kinds_of(line["cause"]) for line in said]
        assert len(kinds) == len(set(kinds)), "each cause once"
        return status


def kinds_of(cause: dict[str, Any]) -> tuple[Any, ...]:
    return (cause["kind"], *((entry["source"], entry["kind"]) for entry in cause["sources"]))


def has(text: str, words: tuple[str, ...]) -> bool:
    return all(re.search(word, text) for word in words)


@contextmanager
def stalls(folder: Path, browser: Browser | None, **changes: Any) -> Iterator[Stalls]:
    port = free_port()
    config = write_config(folder, status={"http": f"127.0.0.1:{port}"}, **changes)
    with ExitStack() as stack:
        process = stack.enter_context(daemon(config))
        process.connect().close()
        tab = browser and stack.enter_context(browser.tab(f"http://127.0.0.1:{port}/"))
        yield stack.enter_context(closing(Stalls(process, tab)))


def test_what_people_and_trainers_do_is_named(tmp_path: Path, browser_if_any: Browser | None) -> None:
    """Eight stalls of one run: each is said, ends, and the next one is said."""
    rollout, sampling = {**IMPATIENT, "max_staleness": 0}, {"max_new_tokens": 64}
    with stalls(tmp_path, browser_if_any, rollout=rollout, sampling=sampling) as run:
        trainer, person = run.trainer, run.person

        for name in ("easy", "hard"):
            person.pause(name)
        run.says(r"[Ss]tep 0: no source .* weight above 0; paused: easy, hard \(orchestrator resume SOURCE\)")
        run.is_late_in_large_letters()
        assert len(run.told()) == 1, "once, however long it lasts"

        person.resume("easy")
        person.set_weight("easy", 0)
        run.says(r"paused: hard", r"weight 0: easy \(orchestrator set-weight SOURCE WEIGHT\)")
        person.set_weight("easy", None)
        person.resume("hard")
        leases = [trainer.get_batch(timeout_s=30), trainer.get_batch(timeout_s=30)]
        there = [line["message"] for line in run.process.log if "is ready after" in line["message"]]
        assert len(there) == 1, "the end of the wait is told of too"

        pid = person.status()["leases"][0]["held_by_pid"]
        run.says(rf"ank 0 \(process {pid}\) holds 2 leases, of steps 0 and 1: acknowledge one .*; step 0 .* for \d+ s")
        with pytest.raises(BatchTimeout):
            trainer.get_batch(timeout_s=1.3 * FIRST_WORD_S)
        assert len([line for line in run.told() if "holds 2 leases" in line["message"]]) == 1, "once"
        for batch in leases:
            trainer.ack(batch.lease)

        trainer.close()
        run.trainer = run.process.connect(rank=0, world_size=2)
        run.trainer.ack(run.trainer.get_batch(timeout_s=30).lease)
        run.says(r"[Ss]tep 2 has not been taken by rank 1 of 2 yet")
        with run.process.connect(rank=1, world_size=2) as other:
            other.ack(other.get_batch(timeout_s=30).lease)
        run.trainer.close()
        run.trainer = run.process.connect()

        person.pause_generation(mode="abort", timeout_s=60)
        run.empty()
        run.says(r"lacks \d of \d groups", r"paused by pause_generation for \d+ s \(at most 60 s\)")
        person.continue_generation()

        person.drain_engine("scripted-0")
        run.empty()
        run.says(r"no engine is available: scripted-0 is draining \(orchestrator engines resume scripted-0\)")
        person.resume_engine("scripted-0")

        gone = person.add_engine({"kind": "llamacpp", "url": f"http://127.0.0.1:{free_port()}", "name": "gone"})
        person.remove_engine("scripted-0")
        run.empty()
        run.says(rf"lacks \d of \d groups, because no engine is available: {gone} is down \(.*cannot connect")
        person.add_engine({"kind": "scripted", "name": "slow", "tokens_per_s": 64.0, "first_token_s": 0.0})
        run.trainer.ack(run.trainer.get_batch(timeout_s=30).lease)

        versions = itertools.count(1)
        run.says(
            r"\d+ of its groups went stale and ran again, \d+ were handed out: raise max_staleness",
            meanwhile=lambda: person.set_policy_version(next(versions)),
        )


def test_causes_of_single_sources_are_named_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, browser_if_any: Browser | None
) -> None:
    hangs = put_reward(tmp_path, monkeypatch, "time.sleep(600)")
    for name in ("filtered", "hung", "bound", "tiny"):
        write_prompts(tmp_path / f"{name}.jsonl", 4 if name == "tiny" else 400, text=name)

    def source(name: str, **more: Any) -> dict[str, Any]:
        return {"name": name, "prompts": {"path": f"{name}.jsonl"}, "reward": "contains", **more}

    sources = [
        source("filtered"),
        source("hung", reward={"path": hangs, "timeout_s": 0.2, "concurrency": 2}),
        source("bound", buffer={"groups": 1}, sampling={"max_new_tokens": 4000}),
        source("tiny", prompts={"path": "tiny.jsonl", "epochs": 1}),
    ]
    with stalls(
        tmp_path,
        browser_if_any,
        rollout={**IMPATIENT, "rollout_batch_size": 8},
        engines=[{"kind": "scripted", "tokens_per_s": 100.0, "first_token_s": 0.0}],
        data_sources=sources,
        data_source_weights=[1, 1, 1, 0],
        dynamic_sampling_filter="orchestrator.core.filters.check_reward_nonzero_std",
    ) as run:
        while run.person.status()["sources"]["filtered"]["producer"]["acceptance"] > 0.1:
            time.sleep(0.05)  # it takes some groups to see that a filter keeps none
        status = run.says(
            r"filtered lacks \d of \d groups \(\d+% of its finished groups are dropped, mostly as zero_std \(\d+ of",
            rf"hung lacks \d of \d groups \(its reward {hangs} hung \d+ times \(its workers were killed\)",
            r"bound lacks \d of \d groups \(\d groups? (is|are) in flight; buffer.groups allows 1 group ",
        )
        kinds = {entry["source"]: entry["kind"] for entry in status["cause"]["sources"]}
        assert kinds == {"filtered": "filter", "hung": "reward", "bound": "bound"}

        run.person.set_weight("tiny", 1)
        for name in ("filtered", "hung", "bound"):
            run.person.pause(name)
        run.says(r"no source that can give groups .*; paused: filtered, hung, bound .*; exhausted: tiny")


def test_a_generation_that_is_longer_than_usual_is_named_with_its_samples(
    tmp_path: Path, browser_if_any: Browser | None
) -> None:
    with stalls(
        tmp_path,
        browser_if_any,
        rollout=IMPATIENT,
        sampling={"max_new_tokens": 100_000},
        engines=[{"kind": "scripted", "tokens_per_s": 2000.0, "first_token_s": 0.0, "echo_rate": 0.9}],
    ) as run:
        run.empty()
        status = run.says(
            r"group \d+ is still generating and may not be overtaken again",
            r"group \d+ has been running for \d+ s: sample \d+ is at [\d,]+ tokens.* \(the mean is \d+\)",
        )
        named = status["cause"]["sources"][0]
        assert named["kind"] == "long_generation"
        oldest = status["sources"][named["source"]]["producer"]["oldest"]
        assert f"sample {oldest['generating'][0][0]} is at" in status["cause"]["sentence"]


def test_a_disk_that_takes_nothing_is_named(tmp_path: Path, browser_if_any: Browser | None) -> None:
    with stalls(tmp_path, browser_if_any, rollout=IMPATIENT, sampling={"max_new_tokens": 2000}) as run:
        run.trainer.ack(run.trainer.get_batch(timeout_s=30).lease)
        process = run.process.process
        assert process is not None
        log = max(path.stat().st_size for path in (tmp_path / "state").rglob("*") if path.is_file())
        assert log > 2 * (tmp_path / "log.jsonl").stat().st_size, "so that the log lines have room"
        segment = max((tmp_path / "state").glob("log*"), default=None)
        assert segment is not None, list((tmp_path / "state").iterdir())
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (segment.stat().st_size, resource.RLIM_INFINITY))
        with pytest.raises(BatchTimeout, match=r"the state cannot be written: .*File too large"):
            run.trainer.get_batch(timeout_s=0.5)
        status = run.person.status()
        assert status["cause"]["kind"] == "disk"
        assert "File too large" in status["headline"]["text"]
        assert has(" ".join(line.plain for line in render_screen(status, 400, 40)), ("File too large",))
        if run.tab is not None:
            run.tab.wait_for("document.getElementById('headline').textContent.includes('File too large')")
        assert any("File too large" in line["message"] for line in run.process.log)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        run.trainer.ack(run.trainer.get_batch(timeout_s=30).lease)
