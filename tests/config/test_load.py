"""Loading right configs: defaults, paths, the two forms, sampling; the schema, the documentation and the examples."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic_core import PydanticUndefined
from ruamel.yaml import YAML

from orchestrator.cli import main
from orchestrator.config import (
    Config,
    differences,
    load_config,
    parse_source,
    sampling_header,
    sampling_params,
    source_as_json,
)
from orchestrator.config.document import ConfigFile
from orchestrator.config.messages import sections
from orchestrator.config.schema import config_schema, render_schema
from orchestrator.engines.embedded.spec import EmbeddedSpec
from orchestrator.engines.kinds import ENGINE_KINDS
from orchestrator.engines.llamacpp.spec import LlamaCppSpec
from orchestrator.engines.port import SamplingParams
from orchestrator.errors import ConfigError
from tests.config.test_problems import CASES
from tests.support.paths import ROOT

EXAMPLES = sorted((ROOT / "config").glob("*.yaml"))

MINIMAL = """
engines: [{kind: scripted}]
data_sources: [{name: a, prompts: {path: a.jsonl}}]
data_source_weights: [1]
"""


def load(directory: Path, text: str) -> Config:
    path = directory / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path)


# -- defaults ---------------------------------------------------------------------------------------------------------


def test_the_defaults_are_those_of_the_contract(tmp_path: Path) -> None:
    config = load(tmp_path, MINIMAL)
    assert config.rollout.model_dump() == {
        "rollout_batch_size": 32,
        "n_samples_per_prompt": 8,
        "num_rollout": None,
        "over_sampling_batch_size": None,
        "lookahead": 2,
        "max_staleness": None,
        "partial_rollout": True,
        "mask_offpolicy_in_partial_rollout": False,
        "starvation": {"policy": "wait", "patience_s": 60},
        "failed_sample": "replace",
        "chunk_tokens": 2048,
    }
    assert config.engine_defaults.model_dump() == {"request_timeout_s": 600, "stall_s": 60, "max_retries": 3}
    assert (config.run.seed, config.tokenizer, config.archive) == (0, None, None)
    assert config.sampling_of("a") == config.sampling
    assert sampling_params(config.sampling) == SamplingParams()
    assert config.data_sources[0].reward.model_dump() == {
        "kind": "builtin",
        "path": "exact_match",
        "key": None,
        "timeout_s": 30,
        "concurrency": 16,
        "group": False,
    }
    assert config.status.http == "127.0.0.1:8642"
    assert (config.logging.file, config.logging.level) == (None, "info")
    assert config.outstanding_bound == 4 * 2 * 32


def test_relative_paths_are_relative_to_the_config_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = tmp_path / "elsewhere"
    below = tmp_path / "below"
    elsewhere.mkdir()
    below.mkdir()
    text = MINIMAL.replace("a.jsonl", "../data/a.jsonl").replace("kind: scripted", "kind: embedded, model: ~/m.gguf")
    (below / "run.yaml").write_text(text + "logging: {file: /var/log/x.jsonl}\nsampling: {max_new_tokens: 8}\n")
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("HOME", "/home/someone")

    config = load_config(Path("../below/run.yaml"))

    assert config.run.state_dir == below / "state"
    assert config.consumer.socket == below / "run/orchestrator.sock"
    assert config.data_sources[0].prompts.path == tmp_path / "data/a.jsonl"
    assert isinstance(config.engines[0], EmbeddedSpec)
    assert config.engines[0].model == Path("/home/someone/m.gguf")
    assert config.logging.file == Path("/var/log/x.jsonl")


def test_a_link_to_a_config_stands_where_the_link_is(tmp_path: Path) -> None:
    real, linked = tmp_path / "real", tmp_path / "linked"
    real.mkdir()
    linked.mkdir()
    (real / "run.yaml").write_text(MINIMAL)
    (linked / "run.yaml").symlink_to(real / "run.yaml")
    assert load_config(linked / "run.yaml").run.state_dir == linked / "state"


def test_a_socket_path_of_107_bytes_is_the_longest(tmp_path: Path) -> None:
    base = f"{tmp_path}/"
    longest = base + "s" * (107 - len(base.encode()))
    assert load(tmp_path, MINIMAL + f"consumer: {{socket: {longest}}}\n").consumer.socket == Path(longest)
    with pytest.raises(
        ValueError, match=r"consumer\.socket: .* has 108 bytes; the path of a Unix socket has at most 107"
    ):
        load(tmp_path, MINIMAL + f"consumer: {{socket: {longest}s}}\n")


# -- engines and sampling ---------------------------------------------------------------------------------------------


def test_engines_get_names(tmp_path: Path) -> None:
    engines = """
engines:
  - {kind: scripted}
  - {kind: llamacpp, url: "https://gpu-3:8080/", logprobs: raw}
  - {kind: embedded, name: own}
"""
    config = load(tmp_path, MINIMAL.replace("engines: [{kind: scripted}]", engines) + "sampling: {max_new_tokens: 8}\n")
    assert [engine.name for engine in config.engines] == ["scripted-0", "gpu-3:8080", "own"]
    assert isinstance(config.engines[1], LlamaCppSpec)
    assert config.engines[1].url == "https://gpu-3:8080"
    assert config.logprobs_kind == "raw"
    assert [engine.kind for engine in config.engines] == ["scripted", "llamacpp", "embedded"]
    assert config.engines[0].adapter_options()["name"] == "scripted-0"


@pytest.mark.parametrize("spec", ENGINE_KINDS.specs.values(), ids=ENGINE_KINDS.specs)
def test_the_keys_of_an_engine_are_those_of_its_adapter(spec: Any) -> None:
    parameters = inspect.signature(spec.adapter).parameters
    for key, field in spec.model_fields.items():
        if key not in ("kind", "name"):
            expected = inspect.Parameter.empty if field.is_required() else field.default
            assert parameters[key].default == expected, key
    given = {name for name, parameter in parameters.items() if parameter.default is inspect.Parameter.empty}
    assert given <= {*spec.model_fields, "workdir"}


def test_a_sources_sampling_is_laid_over_the_general_one(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        """
engines: [{kind: scripted}]
sampling: {temperature: 0.7, stop: "\\n", seed: 5, chat_template_kwargs: {enable_thinking: false}}
data_sources:
  - {name: a, prompts: {path: a.jsonl}, sampling: {max_new_tokens: 9, temperature: 1.0, stop: [x, y], seed: null}}
  - {name: b, prompts: {path: a.jsonl}}
data_source_weights: [1, 1]
""",
    )
    a, b = config.sampling_of("a"), config.sampling_of("b")
    assert (a.max_new_tokens, a.temperature, a.stop, a.seed) == (9, 1.0, ("x", "y"), None)
    assert (b.max_new_tokens, b.temperature, b.stop, b.seed) == (1024, 0.7, ("\n",), 5)
    assert a.chat_template_kwargs == b.chat_template_kwargs == {"enable_thinking": False}
    assert sampling_params(a, seed=3).seed == 3
    assert sampling_params(b, seed=3).seed == 5
    assert json.loads(json.dumps(sampling_header(a)))["stop"] == ["x", "y"]


# -- the two forms ----------------------------------------------------------------------------------------------------


def test_both_forms_say_the_same(tmp_path: Path) -> None:
    shared = """
engines: [{kind: scripted}]
data_source_weights: [0.3, "lambda step: 0.5 + step/2000"]
data_source_reward_caps: [null, 0.9]
"""
    flat = load(
        tmp_path,
        shared
        + """
prompt_data: [a.jsonl, b.parquet]
prompt_data_source_names: [a, b]
reward: {path: contains, timeout_s: 5}
input_key: question
label_key: answer
metadata_key: more
rollout_shuffle: false
rollout_seed: 42
rollout_batch_size: 8
n_samples_per_prompt: 4
num_rollout: 200
over_sampling_batch_size: 16
rollout: {lookahead: 3}
""",
    )
    prompts = "input_key: question, label_key: answer, metadata_key: more, shuffle: false"
    nested = load(
        tmp_path,
        shared
        + f"""
run: {{seed: 42}}
rollout:
  {{lookahead: 3, rollout_batch_size: 8, n_samples_per_prompt: 4, num_rollout: 200, over_sampling_batch_size: 16}}
data_sources:
  - {{name: a, prompts: {{path: a.jsonl, {prompts}}}, reward: {{path: contains, timeout_s: 5}}}}
  - {{name: b, prompts: {{path: b.parquet, {prompts}}}, reward: {{path: contains, timeout_s: 5}}}}
""",
    )
    assert flat.model_dump() == nested.model_dump()


def test_the_flat_forms_reward_is_exact_match_unless_given(tmp_path: Path) -> None:
    source = "data_sources: [{name: a, prompts: {path: a.jsonl}}]"
    flat = MINIMAL.replace(source, "prompt_data: [a.jsonl]\nprompt_data_source_names: [a]")
    assert load(tmp_path, flat).data_sources[0].reward.path == "exact_match"
    assert load(tmp_path, flat).data_sources[0].prompts.path == tmp_path / "a.jsonl"


def test_tasks_of_reasoning_gym_score_themselves_unless_told_otherwise(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        """
engines: [{kind: scripted}]
data_sources:
  - {name: a, prompts: {path: "reasoning_gym:chain_sum", size: 5, seed: 7, options: {min_terms: 3}}}
  - {name: b, prompts: {path: "reasoning_gym:chain_sum"}, reward: contains}
  - {name: c, prompts: {path: c.jsonl}}
data_source_weights: [1, 1, 1]
""",
    )
    assert [source.reward.path for source in config.data_sources] == ["reasoning_gym", "contains", "exact_match"]
    assert config.data_sources[0].prompts.model_dump() == {
        "kind": "reasoning_gym",
        "path": "reasoning_gym:chain_sum",
        "size": 5,
        "seed": 7,
        "options": {"min_terms": 3},
        "shuffle": True,
        "epochs": None,
    }
    flat = load(
        tmp_path,
        """
engines: [{kind: scripted}]
prompt_data: ["reasoning_gym:chain_sum", a.jsonl]
prompt_data_source_names: [a, b]
data_source_weights: [1, 1]
""",
    )
    assert [source.prompts.path for source in flat.data_sources] == ["reasoning_gym:chain_sum", tmp_path / "a.jsonl"]
    assert [source.reward.path for source in flat.data_sources] == ["reasoning_gym", "exact_match"]


def test_a_kind_that_is_written_means_what_is_found_without_it(tmp_path: Path) -> None:
    """A reload sees no difference, and what is kept of a source is what the file says."""
    silent = """
engines: [{kind: scripted}]
data_sources:
  - {name: a, prompts: {path: a.jsonl}, reward: contains}
  - {name: b, prompts: {path: B.PARQUET, input_key: q}, reward: {path: my.rewards.score, timeout_s: 5}}
  - {name: c, prompts: {path: "reasoning_gym:chain_sum", size: 5}}
  - {name: d, prompts: {path: d.jsonl}}
data_source_weights: [1, 1, 1, 1]
"""
    spoken = """
engines: [{kind: scripted}]
data_sources:
  - {name: a, prompts: {kind: jsonl, path: a.jsonl}, reward: {kind: builtin, path: contains}}
  - name: b
    prompts: {kind: parquet, path: B.PARQUET, input_key: q}
    reward: {kind: function, path: my.rewards.score, timeout_s: 5, url: null}
  - {name: c, prompts: {kind: reasoning_gym, path: chain_sum, size: 5}}
  - {name: d, prompts: {kind: jsonl, path: d.jsonl}, reward: {path: exact_match}}
data_source_weights: [1, 1, 1, 1]
"""
    one, other = load(tmp_path, silent), load(tmp_path, spoken)
    assert differences(one, other) == []
    assert [source.prompts.kind for source in one.data_sources] == ["jsonl", "parquet", "reasoning_gym", "jsonl"]
    assert [source.reward.kind for source in one.data_sources] == ["builtin", "function", "builtin", "builtin"]
    kept = [source_as_json(source) for source in one.data_sources]
    assert kept[0] == {"name": "a", "prompts": {"path": str(tmp_path / "a.jsonl")}, "reward": {"path": "contains"}}
    assert kept[2]["reward"] == {"path": "reasoning_gym"}
    again = [parse_source(source, 1, None, directory=tmp_path) for source in kept]
    assert again == list(other.data_sources)


def test_with_its_kind_a_file_may_have_any_name(tmp_path: Path) -> None:
    config = load(tmp_path, MINIMAL.replace("{path: a.jsonl}", "{kind: jsonl, path: rows.txt}"))
    assert config.data_sources[0].prompts.file == tmp_path / "rows.txt"


def test_a_built_in_reward_may_still_be_called_a_function(tmp_path: Path) -> None:
    """As files did before there was ``builtin``; what is kept of such a source stays what it was."""
    source = "{path: a.jsonl}, reward: {kind: function, path: contains, api_key_env: null}"
    config = load(tmp_path, MINIMAL.replace("{path: a.jsonl}", source))
    assert config.data_sources[0].reward.needs_label
    assert source_as_json(config.data_sources[0])["reward"] == {"kind": "function", "path": "contains"}


KEYS = sorted({key for section in sections().values() for key in section.model_fields})
DOCUMENTS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=6),
    max_leaves=12,
)


@settings(deadline=None)
@given(DOCUMENTS, st.sampled_from([key for key in KEYS if key in ConfigFile.model_fields]))
@example("\x85", "archive")  # ends a line to some
def test_any_document_is_answered_with_problems_that_name_the_file(
    tmp_path_factory: pytest.TempPathFactory, value: Any, key: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    # JSON is YAML but for one control character; all others are escaped.
    path.write_text(json.dumps(value if isinstance(value, dict) and value else {key: value}).replace("\x7f", ""))
    with pytest.raises(ConfigError) as caught:  # nothing that small has engines, sources and weights
        load_config(path)
    assert all(line.startswith(str(path)) for line in str(caught.value).splitlines())


# -- schema and documentation -----------------------------------------------------------------------------------------


def test_the_committed_schema_is_that_of_the_models() -> None:
    committed = (ROOT / "config/orchestrator.schema.json").read_text(encoding="utf-8")
    assert committed == render_schema(), "python -m orchestrator.config.schema config/orchestrator.schema.json"
    jsonschema.Draft202012Validator.check_schema(json.loads(committed))


SCHEMA_KNOWS = [
    "unknown key, near a known one",
    "key missing deep inside",
    "number in quotes",
    "true for a number",
    "yes for true",
    "below its bound",
    "none of the choices",
    "section without keys",
    "engine of an unknown kind",
    "no engine",
    "no source",
    "weights by name",
    "weight below zero",
    "both forms",
    "half of the flat form",
]


@pytest.mark.parametrize("case", SCHEMA_KNOWS)
def test_the_schema_refuses_what_an_editor_should_underline(case: str) -> None:
    document = YAML(typ="safe", pure=True).load(CASES[case].text)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, config_schema())


DOCUMENTATION = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")


def documented_keys() -> list[tuple[tuple[str, ...], str, Any]]:
    return [(path, key, field) for path, section in sections().items() for key, field in section.model_fields.items()]


@pytest.mark.parametrize(("path", "key", "field"), documented_keys(), ids=lambda value: str(value)[:40])
def test_a_key_is_described_in_the_schema_and_in_the_documentation(path: Any, key: str, field: Any) -> None:
    assert field.description
    rows = set(re.findall(r"^\| `(\w+)` \| (.+?) \|", DOCUMENTATION, re.MULTILINE))
    if re.search(rf"^## .*\b{key}\b|^`{key}:` ", DOCUMENTATION, re.MULTILINE):
        return  # a section with a part of its own
    if field.is_required():
        expected = "*required*"
    elif field.default is PydanticUndefined:
        expected = "`{}`"
    else:
        default = list(field.default) if isinstance(field.default, tuple) else field.default
        expected = f"`{default if isinstance(default, str) else json.dumps(default)}`"
    assert (key, expected) in rows, [row for row in rows if row[0] == key]


# -- examples ---------------------------------------------------------------------------------------------------------


def test_there_are_examples_of_every_engine_and_of_both_forms() -> None:
    assert {engine.kind for path in EXAMPLES for engine in load_config(path).engines} == set(ENGINE_KINDS.specs)
    assert {"minimal.yaml", "curriculum.yaml", "llamacpp.yaml", "flat.yaml"} <= {path.name for path in EXAMPLES}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_loads_passes_check_and_the_schema(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# yaml-language-server: $schema=orchestrator.schema.json\n")
    jsonschema.validate(YAML(typ="safe", pure=True).load(text), config_schema())
    assert main(["check", str(path)]) == 0
