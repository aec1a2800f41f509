"""A real daemon whose engines change while it runs: their parameters, and which of them there are."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from anyio.from_thread import start_blocking_portal

from orchestrator.client import RolloutClient
from orchestrator.engines.embedded.tiny_model import write_tiny_model
from orchestrator.errors import BadRequest, UpdateFailed, VersionWentBack
from tests.daemon.test_end_to_end import assert_accounts, run_cli, take
from tests.support.daemon_process import daemon, write_config
from tests.support.fake_openai import fake_openai
from tests.support.fault_proxy import FaultProxy, Rates, fault_proxy

pytestmark = pytest.mark.timeout(120)

DEADLINE_S = 30.0


def engines(client: RolloutClient) -> dict[str, dict[str, Any]]:
    return {engine["name"]: engine for engine in client.engines()}


def wait_until_up(client: RolloutClient, name: str) -> dict[str, Any]:
    deadline = time.monotonic() + DEADLINE_S
    while (engine := engines(client)[name])["state"] != "up":
        assert time.monotonic() < deadline, engine
    return engine


@contextmanager
def serving(server: Callable[[], AbstractAsyncContextManager[Any]]) -> Iterator[str]:
    """The URL of a server that runs in a thread of its own, beside a test that blocks."""
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(portal.call(server)) as fake:
        yield fake.url


def scripted(*names: str, **options: Any) -> list[dict[str, Any]]:
    return [{"kind": "scripted", "name": name, "time_scale": 0.0} | options for name in names]


# -- parameters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rolling", [False, True])
def test_an_update_is_in_force_at_once_and_after_a_crash(tmp_path: Path, rolling: bool) -> None:
    config = write_config(tmp_path, engines=scripted("one", "two"))
    with daemon(config) as process:
        with process.connect() as client:
            take(client, 2)
            report = client.update_weights("/weights/3", 3, rolling=rolling)
            assert report["version"] == 3
            assert [(engine["engine"], engine["error"]) for engine in report["engines"]] == [
                ("one", None),
                ("two", None),
            ]
            assert {name: engine["policy_version"] for name, engine in engines(client).items()} == {"one": 3, "two": 3}
            with pytest.raises(VersionWentBack):
                client.update_weights("/weights/2", 2)
            assert client.status()["policy_version"] == 3
            process.kill()
        process.start()
        with process.connect() as client:
            # The engines of this test end with the daemon: they come back without the version, and are given it again.
            for name in ("one", "two"):
                assert wait_until_up(client, name)["policy_version"] == 3
            assert client.get_batch(timeout_s=30).policy_version == 3
            assert_accounts(client.status())


def test_an_update_that_no_engine_takes_changes_nothing(tmp_path: Path) -> None:
    config = write_config(tmp_path, engines=[{"kind": "embedded", "name": "own", "context_tokens": 64, "threads": 1}])
    with daemon(config) as process, process.connect() as client:
        take(client, 1)
        with pytest.raises(UpdateFailed, match=r"own: .*no-such\.gguf") as caught:
            client.update_weights(tmp_path / "no-such.gguf", 1)
        assert [engine["updated"] for engine in caught.value.data["engines"]] == [False]
        assert client.status()["policy_version"] == 0
        take(client, 1)


def test_a_real_server_takes_new_parameters_while_it_generates(tmp_path: Path) -> None:
    """Greedy responses to the same prompts are others afterwards, and each is wholly of one of the two models."""
    paths = [tmp_path / "a.gguf", tmp_path / "b.gguf"]
    for seed, path in enumerate(paths):
        write_tiny_model(path, seed=seed)
    (tmp_path / "easy.jsonl").write_text('{"prompt": "say something: ", "label": "x"}\n')
    config = write_config(
        tmp_path,
        engines=[{"kind": "embedded", "name": "own", "model": "a.gguf", "context_tokens": 256, "threads": 1}],
        sampling={"max_new_tokens": 24, "temperature": 0.0},
        data_sources=[{"name": "easy", "prompts": {"path": "easy.jsonl"}, "reward": "contains"}],
        data_source_weights=[1.0],
    )
    texts: dict[int, set[str]] = {}
    with daemon(config) as process:
        with process.connect() as client:
            for version in (0, 1, 2):
                if version:
                    report = client.update_weights(paths[version % 2], version, "finish")
                    assert [engine["error"] for engine in report["engines"]] == [None]
                for _ in range(6):
                    batch = client.get_batch(timeout_s=30)
                    for group in batch.groups:
                        for sample in group.samples:
                            [[held, _]] = sample.versions
                            texts.setdefault(held, set()).add(sample.text)
                    client.ack(batch.lease)
            process.kill()
        process.start()
        with process.connect() as client:
            assert wait_until_up(client, "own")["policy_version"] == 2
    assert all(len(said) == 1 for said in texts.values())
    assert texts[0] == texts[2] != texts[1]


def test_a_server_that_gives_text_alone_can_be_used_and_its_samples_say_so(tmp_path: Path) -> None:
    """What is complete is parked over a restart; what is not begins anew."""
    lacks = frozenset({"props", "completions", "tokenize", "detokenize"})
    with serving(lambda: fake_openai(is_vllm=False, lacks=lacks, length=(20, 200))) as url:
        engine = {"kind": "openai", "name": "chat", "url": url, "dialect": "chat"}
        config = write_config(tmp_path, engines=[engine], sampling={"max_new_tokens": 300})
        with daemon(config) as process:
            with process.connect() as client:
                client.set_policy_version(4)
                take(client, 2)
            assert process.stop() == 0
            process.start()
            with process.connect() as client:
                batch = client.get_batch(timeout_s=30)
                for group in batch.groups:
                    assert "logprobs" not in group.frame
                    assert len(group.prompt_tokens) == 0
                    for sample in group.samples:
                        assert (sample.metadata["text_only"], len(sample.response_tokens)) == (True, 0)
                        assert sample.text
                        assert [version for version, count in sample.versions if count == 0] == [4]
                assert_accounts(client.status())


@asynccontextmanager
async def late_chat() -> AsyncIterator[FaultProxy]:
    """A server that says neither its version nor since when it runs, and is in no hurry."""
    lacks = frozenset({"props", "completions", "tokenize", "detokenize"})
    async with fake_openai(is_vllm=False, lacks=lacks, length=(5, 20)) as fake:
        port = int(fake.url.rpartition(":")[2])
        async with fault_proxy(port, Rates(latency=1.0), latency_s=(0.7, 0.7)) as proxy:
            yield proxy


def test_a_version_that_is_set_while_engines_are_looked_at_for_the_first_time_is_of_them_too(tmp_path: Path) -> None:
    with serving(late_chat) as url:
        config = write_config(tmp_path, engines=[{"kind": "openai", "name": "chat", "url": url, "dialect": "chat"}])
        with daemon(config) as process, process.connect() as client:
            client.set_policy_version(4)
            assert client.get_batch(timeout_s=30).policy_version == 4


# -- engines that come and go -----------------------------------------------------------------------------------------


def test_engines_come_and_go_by_command_and_that_survives_a_crash(tmp_path: Path) -> None:
    config = write_config(tmp_path, engines=scripted("one", "two"))
    sock = str(tmp_path / "sock")

    def cli(*arguments: str) -> str:
        done = run_cli("engines", *arguments, "--socket", sock, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    with daemon(config) as process:
        with process.connect() as client:
            take(client, 1)
            assert cli("add", "{kind: scripted, name: three, time_scale: 0.0}") == "added three; it is up\n"
            assert cli("drain", "one").startswith("one gets no new requests; ")
            assert cli("remove", "two").startswith("removed two; ")
            shown = cli()
            assert "three" in shown
            assert "draining" in shown
            assert "two" not in shown
            refused = run_cli("engines", "add", "{kind: scriptd}", "--socket", sock, cwd=tmp_path)
            assert refused.returncode == 1
            assert "scripted" in refused.stderr
            with pytest.raises(BadRequest, match="'three' is already the name of another engine"):
                client.add_engine({"kind": "scripted", "name": "three"})
            with pytest.raises(BadRequest, match="no engine 'two'; the engines are one, three"):
                client.remove_engine("two")
            take(client, 2)
            process.kill()
        process.start()
        with process.connect() as client:
            assert {name: engine["state"] for name, engine in engines(client).items()} == {
                "one": "draining",
                "three": "up",
            }
            take(client, 2)
            client.resume_engine("one")
            assert wait_until_up(client, "one")
            process.kill()
        # What the file says of an engine anew is in force.
        file = json.loads(config.read_text())
        file["engines"][1]["max_in_flight"] = 7
        config.write_text(json.dumps(file))
        process.start()
        with process.connect() as client:
            assert list(engines(client)) == ["one", "two", "three"]
            assert engines(client)["two"]["max_in_flight"] == 7
            take(client, 2)
            assert_accounts(client.status())
        process.wait_for_line("This no longer applies")


def test_the_last_engine_may_go_and_the_cause_says_how_to_get_one(tmp_path: Path) -> None:
    config = write_config(tmp_path, engines=scripted("one", time_scale=1.0, tokens_per_s=10.0))
    with daemon(config) as process, process.connect() as client:
        assert client.remove_engine("one") >= 0
        assert "orchestrator engines add" in client.status()["cause"]["sentence"]
        client.add_engine({"kind": "scripted", "name": "quick", "time_scale": 0.0})
        take(client, 2)
        assert_accounts(client.status())
