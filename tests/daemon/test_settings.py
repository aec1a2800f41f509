"""Every key of the config is taken over by a reload, or refused with its reason: the two tables below say which.

A key that is added to the schema and to neither table fails here, and so does one that ``daemon/settings.py`` or
``config/differences.py`` forgets.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from orchestrator.config import Config, differences, load_config, with_fixed
from orchestrator.config.schema import config_schema
from orchestrator.daemon.settings import live_settings, start_settings
from orchestrator.errors import ConfigError
from tests.support.daemon_process import daemon

Values = dict[str, Any]


class Refused(NamedTuple):
    """A value that the config refuses at that place, where the key can have no other than its default."""

    value: Any


ENGINE = {"kind": "scripted", "name": "e", "time_scale": 0.0}
OTHER_ENGINE = {"kind": "scripted", "name": "e", "seed": 5}
SERVED = {"url": "http://127.0.0.1:1", "api_key_env": "KEY", "max_in_flight": 3, "name": "f", "logprobs": "raw"}
FILE = {"shuffle": False, "epochs": 3, "label_key": "answer", "metadata_key": "more", "max_new_tokens_key": "longest"}
SAMPLING = {
    "max_new_tokens": 6,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 7,
    "min_p": 0.1,
    "stop": ["x"],
    "stop_token_ids": [2],
    "seed": 9,
    "chat_template_kwargs": {"enable_thinking": False},
}
CALLED = {"key": "score", "timeout_s": 7.0, "concurrency": 2, "group": True}
FUNCTION = {"kind": "function", "path": "tests.support.reward_functions.length"}
HTTP = {"kind": "http", "url": "http://127.0.0.1:1/a"}

REWARDS: dict[str, tuple[Values, Values]] = {
    "reward[builtin]": (
        {"kind": "builtin", "path": "contains"},
        {
            "kind": FUNCTION,
            "path": "exact_match",
            "timeout_s": 7.0,
            "concurrency": 2,
            "key": Refused("score"),
            "group": Refused(True),
        },
    ),
    "reward[function]": (FUNCTION, {**CALLED, "kind": HTTP, "path": "tests.support.reward_functions.whole"}),
    "reward[http]": (HTTP, {**CALLED, "kind": FUNCTION, "url": "http://127.0.0.1:1/b", "api_key_env": "KEY"}),
}

LIVE: dict[str, tuple[Values, Values]] = {
    "rollout": (
        {},
        {
            "rollout_batch_size": 8,
            "n_samples_per_prompt": 3,
            "num_rollout": 50,
            "over_sampling_batch_size": 40,
            "lookahead": 3,
            "max_staleness": 1,
            "mask_offpolicy_in_partial_rollout": True,
            "failed_sample": "drop_group",
        },
    ),
    "sampling": ({}, SAMPLING),
    "": (
        {},
        {
            "data_source_weights": [0.5],
            "data_source_reward_caps": [0.9],
            "dynamic_sampling_filter": "check_reward_nonzero_std",
        },
    ),
    "engines[sglang]": (
        {"kind": "sglang", "name": "e", "url": "http://127.0.0.1:9"},
        {**SERVED, "kind": OTHER_ENGINE},
    ),
    "engines[openai]": (
        {"kind": "openai", "name": "e", "url": "http://127.0.0.1:9"},
        {**SERVED, "kind": OTHER_ENGINE, "model": "m", "dialect": "vllm"},
    ),
    "engines[llamacpp]": (
        {"kind": "llamacpp", "name": "e", "url": "http://127.0.0.1:9"},
        {**SERVED, "kind": OTHER_ENGINE},
    ),
    "engines[embedded]": (
        {"kind": "embedded", "name": "e"},
        {
            "kind": OTHER_ENGINE,
            "model": "m.gguf",
            "slots": 2,
            "context_tokens": 4096,
            "threads": 1,
            "max_in_flight": 3,
            "name": "f",
            "logprobs": "raw",
        },
    ),
    "engines[scripted]": (
        ENGINE,
        {
            "kind": {"kind": "sglang", "name": "e", "url": "http://127.0.0.1:9"},
            "seed": 5,
            "tokens_per_s": 50.0,
            "first_token_s": 0.1,
            "length": [1, 3],
            "tail_sigma": 0.5,
            "failure_rate": 0.01,
            "reset_rate": 0.01,
            "hang_rate": 0.01,
            "reject_rate": 0.01,
            "delay_s": 0.1,
            "time_scale": 0.5,
            "echo_rate": 0.5,
            "max_in_flight": 3,
            "name": "f",
        },
    ),
    "data_sources": ({}, {"name": "new", "renamed_from": "old"}),
    "data_sources.sampling": ({}, SAMPLING),
    "data_sources.buffer": ({}, {"groups": 20, "bytes": 1 << 20}),
    "data_sources.prompts[jsonl]": (
        {"kind": "jsonl", "path": "a.jsonl"},
        {**FILE, "kind": {"kind": "parquet", "path": "a.parquet"}, "path": "b.jsonl", "input_key": "question"},
    ),
    "data_sources.prompts[parquet]": (
        {"kind": "parquet", "path": "a.parquet"},
        {**FILE, "kind": {"kind": "jsonl", "path": "a.jsonl"}, "path": "b.parquet", "input_key": "question"},
    ),
    "data_sources.prompts[reasoning_gym]": (
        {"kind": "reasoning_gym", "path": "reasoning_gym:chain_sum"},
        {
            "kind": {"kind": "jsonl", "path": "a.jsonl"},
            "shuffle": False,
            "epochs": 3,
            "path": "reasoning_gym:leg_counting",
            "size": 7,
            "seed": 8,
            "options": {"min_terms": 3},
        },
    ),
    **{f"data_sources.{place}": rows for place, rows in REWARDS.items()},
    "flat": (
        {},
        {
            "prompt_data": ["b.jsonl"],
            "prompt_data_source_names": ["new"],
            "input_key": "question",
            "label_key": "answer",
            "metadata_key": "more",
            "rollout_shuffle": False,
            "rollout_batch_size": 8,
            "n_samples_per_prompt": 3,
            "num_rollout": 50,
            "over_sampling_batch_size": 40,
        },
    ),
    **{f"flat.{place}": rows for place, rows in REWARDS.items()},
}
"""Taken over by a reload. By place: what stands there, and for each of its keys another value.

For ``kind`` it is what stands there instead.
"""

AT_START: dict[str, tuple[Values, Values]] = {
    "run": ({}, {"name": "other", "seed": 4, "state_dir": "other_state", "keep_checkpoints": 3}),
    "rollout": ({}, {"partial_rollout": False, "chunk_tokens": 64}),
    "rollout.starvation": ({}, {"policy": "borrow", "patience_s": 5.0}),
    "engine_defaults": ({}, {"request_timeout_s": 500.0, "stall_s": 50.0, "max_retries": 1}),
    "tokenizer": ({"path": "t"}, {"path": "u", "chat_template": "{{ messages }}", "add_generation_prompt": False}),
    "archive": ({"path": "archive"}, {"path": "other_archive", "format": "parquet", "keep": 3}),
    "consumer": ({}, {"socket": "other_sock", "max_connections": 9, "allow_uids": [1]}),
    "status": ({}, {"http": "127.0.0.1:9"}),
    "logging": ({}, {"file": "other.jsonl", "level": "debug"}),
    "metrics": ({}, {"jsonl": False, "max_bytes": 1 << 20, "keep": 2}),
    "metrics.sinks[tensorboard]": (
        {"kind": "tensorboard"},
        {"kind": {"kind": "wandb"}, "dir": "d"},
    ),
    "metrics.sinks[wandb]": (
        {"kind": "wandb"},
        {
            "kind": {"kind": "tensorboard"},
            "project": "p",
            "name": "n",
            "dir": "d",
            "entity": "e",
            "mode": "offline",
            "tags": ["t"],
        },
    ),
    "metrics.sinks[mlflow]": (
        {"kind": "mlflow", "tracking_uri": "file:/a"},
        {"kind": {"kind": "tensorboard"}, "tracking_uri": "file:/b", "experiment": "x", "name": "n"},
    ),
    "metrics.sinks[trackio]": (
        {"kind": "trackio"},
        {"kind": {"kind": "tensorboard"}, "project": "p", "name": "n", "dir": "d"},
    ),
    "flat": ({}, {"rollout_seed": 4}),
}
"""Refused until the next start, with a reason; as :data:`LIVE`."""

BY_THE_COMMAND: tuple[str, ...] = ("logging.file", "logging.level")
"""What ``cli/run.py`` takes, before there is a daemon."""

FLAT: Values = {"prompt_data": ["a.jsonl"], "prompt_data_source_names": ["easy"], "reward": FUNCTION}
SOURCE: Values = {"name": "easy", "prompts": {"path": "a.jsonl"}, "reward": FUNCTION}


class Row(NamedTuple):
    """One key, another value of it, and what is promised of such a change."""

    place: str
    key: str
    is_live: bool

    def __str__(self) -> str:
        where = self.place.removeprefix("flat").lstrip(".")
        return f"{where}.{self.key}" if where else self.key


ROWS = [
    Row(place, key, is_live)
    for is_live, table in ((True, LIVE), (False, AT_START))
    for place, (_, changes) in table.items()
    for key in changes
]


# -- the schema is what the tables say ---------------------------------------------------------------------------------


def keys_of(schema: Mapping[str, Any], node: Mapping[str, Any], path: str) -> Iterator[str]:
    """The paths of all keys below a node of a JSON Schema, with the kind of what stands for one of several."""
    found = list(mappings(schema, node))
    if not found:
        yield path
    for mapping in found:
        kind = mapping["properties"].get("kind", {})
        name = kind.get("const") or next(iter(kind.get("enum", ())), None)
        place = f"{path}[{name}]" if name else path
        for key, inner in mapping["properties"].items():
            yield from keys_of(schema, inner, f"{place}.{key}" if place else key)


def mappings(schema: Mapping[str, Any], node: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The mappings of known keys that a node may be, or may be a list of."""
    if "$ref" in node:
        yield from mappings(schema, schema["$defs"][node["$ref"].rpartition("/")[2]])
    if "properties" in node:
        yield node
    elif isinstance(node.get("items"), dict):
        yield from mappings(schema, node["items"])
    for choice in (*node.get("anyOf", ()), *node.get("oneOf", ())):
        yield from mappings(schema, choice)


def test_every_key_of_the_schema_is_in_one_of_the_tables_and_in_no_other() -> None:
    schema = config_schema()
    del schema["oneOf"]  # which of the two forms: all keys stand above it
    known = [str(row) for row in ROWS]
    assert sorted(known) == sorted(set(known)), "a key is in both tables"
    keys = set(keys_of(schema, schema, ""))
    assert keys - set(known) == set(), "say in a table of this file what a reload does with them"
    assert set(known) - keys == set(), "these keys are not there any more"


# -- each key, by itself -----------------------------------------------------------------------------------------------


def base(place: str) -> Values:
    """A whole config, of the form that the place is of."""
    config: Values = {
        "run": {"state_dir": "state"},
        "rollout": {"rollout_batch_size": 4, "n_samples_per_prompt": 2},
        "sampling": {"max_new_tokens": 8},
        "engines": [ENGINE],
        "data_source_weights": [0.7],
        "consumer": {"socket": "sock"},
        "status": {"http": None},
        "logging": {"file": "log.jsonl"},
    }
    if place.startswith("flat"):
        return {key: config[key] for key in config if key != "rollout"} | FLAT
    return config | {"data_sources": [dict(SOURCE)]}


def put(config: Values, place: str, values: Values) -> None:
    """Have the values at the place, beside what is there; a mapping of another kind takes the place."""
    names, _, kind = place.removeprefix("flat").strip(".").removesuffix("]").partition("[")
    *path, last = names.split(".")
    target = config
    for name in path:
        found = target.setdefault(name, {})
        target = found[0] if isinstance(found, list) else found
    if not last:
        config.update(values)
    elif last in ("engines", "sinks"):
        target[last] = [values]
    elif last == "data_sources":
        target[last] = [target[last][0] | values]
    elif kind:
        target[last] = values
    else:
        target[last] = target.get(last, {}) | values


def changed(rows: dict[str, tuple[Values, Values]], place: str, key: str) -> Values:
    """What stands at the place once that key has its other value."""
    before, changes = rows[place]
    value = changes[key]
    return value if key == "kind" else before | {key: value.value if isinstance(value, Refused) else value}


def write(folder: Path, config: Values) -> Path:
    path = folder / "config.yaml"
    path.write_text(json.dumps(config))
    return path


def load(folder: Path, place: str, values: Values) -> Config:
    config = base(place)
    put(config, place, values)
    return load_config(write(folder, config))


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Something by the name of each package that a sink needs: it is looked for, and never imported."""
    folder = tmp_path / "packages"
    folder.mkdir()
    for name in ("tensorboardX", "wandb", "mlflow", "trackio"):
        (folder / f"{name}.py").touch()
    monkeypatch.syspath_prepend(folder)


@pytest.mark.parametrize("row", ROWS, ids=str)
@pytest.mark.usefixtures("packages")
def test_a_changed_key_changes_what_the_table_says(row: Row, tmp_path: Path) -> None:
    table = LIVE if row.is_live else AT_START
    before, changes = table[row.place]
    old = load(tmp_path, row.place, before)
    if isinstance(changes[row.key], Refused):
        with pytest.raises(ConfigError):
            load(tmp_path, row.place, changed(table, row.place, row.key))
        return
    new = load(tmp_path, row.place, changed(table, row.place, row.key))
    found = differences(old, new)
    assert found
    assert all(difference.is_live == row.is_live for difference in found)
    assert all(bool(difference.reason) != row.is_live for difference in found), "what is refused has a reason"
    taken = live_settings(with_fixed(old, new))
    if row.is_live:
        assert taken != live_settings(old), "no component would hear of it: see daemon/settings.py"
        assert taken == live_settings(new)
        assert start_settings(with_fixed(old, new)) == start_settings(old), "what has started would have to change"
    else:
        assert taken == live_settings(old), "it is said to wait for the next start, and would not"
        assert start_settings(old) != start_settings(new) or str(row) in BY_THE_COMMAND


# -- all of them, in a daemon ------------------------------------------------------------------------------------------

TOGETHER = (
    "run",
    "rollout",
    "rollout.starvation",
    "sampling",
    "",
    "engine_defaults",
    "archive",
    "consumer",
    "status",
    "logging",
    "metrics",
    "engines[scripted]",
    "data_sources.sampling",
    "data_sources.buffer",
    "data_sources.prompts[jsonl]",
    "data_sources.reward[function]",
)
"""Places whose keys can all change at once, without a server, a package or another source."""

EXCEPT = (
    "engines[scripted].kind",
    "engines[scripted].name",
    "data_sources.prompts[jsonl].kind",
    "data_sources.reward[function].kind",
    "data_sources.reward[function].group",
)
"""Keys there whose change would take another's place."""


def all_at_once(*, change: bool) -> Values:
    config = base("")
    for place in TOGETHER:
        for table in (LIVE, AT_START):
            before, changes = table.get(place, ({}, {}))
            fitting = {key: value for key, value in changes.items() if str(Row(place, key, True)) not in EXCEPT}
            if before or fitting:
                put(config, place, before | (fitting if change else {}))
    return config


def key_in_force(row: Row) -> str:
    """What a difference calls the key."""
    place = row.place.partition("[")[0]
    place = place.replace("data_sources", "data_sources.easy").replace("engines", "engines.e")
    return f"{place}.{row.key}" if place else row.key


def write_prompts(folder: Path) -> None:
    for name, key in (("a", "prompt"), ("b", "question")):
        rows = ({key: f"{name} {i}=", "label": "1", "answer": "2", "more": {}, "longest": 5} for i in range(20))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_daemon_takes_over_what_the_table_says_and_says_why_it_refuses_the_rest(tmp_path: Path) -> None:
    write_prompts(tmp_path)
    config = write(tmp_path, all_at_once(change=False))
    rows = [row for row in ROWS if row.place in TOGETHER and str(row) not in EXCEPT]
    with daemon(config) as process, process.connect() as client:
        assert client.reload()["changes"] == []
        write(tmp_path, all_at_once(change=True))
        changes = client.reload()["changes"]
        for row in rows:
            key = key_in_force(row)
            told = [change for change in changes if change["key"] == key or change["key"].startswith(f"{key}.")]
            assert told, f"{key} is not reported"
            assert all(change["is_live"] == row.is_live for change in told)
            assert all(bool(change["reason"]) != row.is_live for change in told)
        left = client.reload()["changes"]
        assert left == [change for change in changes if not change["is_live"]], "the others are in force"
        status = client.status()
        assert (status["run"]["rollout_batch_size"], status["run"]["num_rollout"]) == (8, 50)
        write(tmp_path, all_at_once(change=False))
        client.reload()
        assert client.reload()["changes"] == []
        assert process.stop() == 0
