"""Wrong configs, each beside what `orchestrator check` says about it.

A case is the wrong part of a config and the exact lines that `check` prints, each beginning with the number of the
line in that part. Keys that the part leaves out and a config needs come after it, so that nothing else is wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from orchestrator.cli import main
from orchestrator.cli.exit_codes import BAD_CONFIG
from orchestrator.engines.kinds import ENGINE_KINDS
from orchestrator.prompts.kinds import PROMPT_KINDS
from orchestrator.rewards.kinds import REWARD_KINDS

ENGINES, PROMPTS, REWARDS = (", ".join(kinds.specs) for kinds in (ENGINE_KINDS, PROMPT_KINDS, REWARD_KINDS))
"""As messages list them."""

REST = {
    "engines": "engines: [{kind: scripted}]",
    "data_sources": "data_sources: [{name: sums, prompts: {path: sums.jsonl}}]",
    "data_source_weights": "data_source_weights: [1]",
}


@dataclass(frozen=True)
class Wrong:
    yaml: str
    says: str

    @property
    def text(self) -> str:
        """The whole file: the wrong part, then what a config needs besides."""
        part = self.yaml.strip("\n")
        given = {line.partition(":")[0] for line in part.splitlines()}
        if "prompt_data" in given:
            given.add("data_sources")
        return "\n".join([part, *(line for key, line in REST.items() if key not in given)]) + "\n"


CASES = {
    # -- keys ---------------------------------------------------------------------------------------------------------
    "unknown key, near a known one": Wrong(
        """
rollout:
  n_samples_per_promt: 4
""",
        "2: rollout.n_samples_per_promt: unknown key (did you mean n_samples_per_prompt?)",
    ),
    "known key in the wrong place": Wrong(
        """
lookahead: 3
""",
        "1: lookahead: unknown key (did you mean rollout.lookahead?)",
    ),
    "key by the name that slime gives it": Wrong(
        """
rollout_max_response_len: 512
""",
        "1: rollout_max_response_len: unknown key (did you mean sampling.max_new_tokens?)",
    ),
    "unknown key, near nothing": Wrong(
        """
status:
  port: 80
""",
        "2: status.port: unknown key (known keys are http)",
    ),
    "key twice": Wrong(
        """
rollout:
  num_rollout: 10
  lookahead: 2
  num_rollout: 20
""",
        "4: rollout.num_rollout: the key is given twice, first on line 2 (keep only one)",
    ),
    "key that is no text": Wrong(
        """
1: one
""",
        "1: the key 1 is not a string (put it in quotes if it is intended)",
    ),
    "key missing deep inside": Wrong(
        """
data_sources:
  - name: sums
    prompts: {shuffle: false}
""",
        "3: data_sources[0].prompts.path: is missing "
        "(File of prompts, .jsonl or .parquet, relative to the config file; or reasoning_gym:TASK)",
    ),
    # -- values -------------------------------------------------------------------------------------------------------
    "number in quotes": Wrong(
        """
rollout:
  rollout_batch_size: "32"
""",
        '2: rollout.rollout_batch_size: expected a whole number, got the string "32" (remove the quotes: 32)',
    ),
    "true for a number": Wrong(
        """
rollout: {lookahead: true}
""",
        "1: rollout.lookahead: expected a whole number, got true",
    ),
    "fraction for a whole number": Wrong(
        """
rollout:
  num_rollout: 1e3
""",
        "2: rollout.num_rollout: expected a whole number, got 1000.0 (write 1000)",
    ),
    "yes for true": Wrong(
        """
rollout:
  partial_rollout: yes
""",
        '2: rollout.partial_rollout: expected true or false, got the string "yes" (without quotes)',
    ),
    "number for a text": Wrong(
        """
run:
  name: 7
""",
        "2: run.name: expected a string, got 7 (put it in quotes)",
    ),
    "below its bound": Wrong(
        """
rollout:
  n_samples_per_prompt: 0
sampling:
  temperature: -0.1
  top_p: 0
""",
        """
2: rollout.n_samples_per_prompt: is 0 (at least 1)
4: sampling.temperature: is -0.1 (at least 0)
5: sampling.top_p: is 0 (above 0)
""",
    ),
    "not a finite number": Wrong(
        """
sampling: {temperature: .nan}
engine_defaults: {stall_s: .inf}
""",
        """
1: sampling.temperature: is nan (expected a finite number)
2: engine_defaults.stall_s: is inf (expected a finite number)
""",
    ),
    "none of the choices": Wrong(
        """
rollout:
  failed_sample: drop
logging:
  level: warn
""",
        """
2: rollout.failed_sample: got the string "drop" (one of replace, drop_group; did you mean drop_group?)
4: logging.level: got the string "warn" (one of debug, info, warning, error; did you mean warning?)
""",
    ),
    "section without keys": Wrong(
        """
run:
sampling: 3
""",
        """
1: run: is null (remove the key to use its default, or give it a value)
2: sampling: expected a mapping of keys, got 3
""",
    ),
    "address without a host": Wrong(
        """
status: {http: 8642}
""",
        '1: status.http: expected host:port, got 8642 (write "127.0.0.1:8642", or null to switch it off)',
    ),
    # -- engines ------------------------------------------------------------------------------------------------------
    "engine of an unknown kind": Wrong(
        """
engines:
  - {kind: scripted}
  - {kind: lamacpp, url: "http://127.0.0.1:8080"}
""",
        f'3: engines[1].kind: got the string "lamacpp" (known kinds are {ENGINES}; did you mean llamacpp?)',
    ),
    "engine by the name of its server": Wrong(
        """
engines:
  - {kind: vllm, url: "http://127.0.0.1:8000"}
""",
        f'2: engines[0].kind: got the string "vllm" (known kinds are {ENGINES}; did you mean openai?)',
    ),
    "engine without a kind": Wrong(
        """
engines:
  - {url: "http://127.0.0.1:8080"}
""",
        f"2: engines[0].kind: is missing (known kinds are {ENGINES})",
    ),
    "no engine": Wrong(
        """
engines: []
""",
        "1: engines: the list is empty (expected at least 1: write [{kind: scripted}])",
    ),
    "URL with a path": Wrong(
        """
engines:
  - kind: llamacpp
    url: http://127.0.0.1:8080/v1
""",
        "3: engines[0].url: 'http://127.0.0.1:8080/v1' has more than a host and a port "
        '(write "http://HOST:PORT"; the adapter adds the paths it needs)',
    ),
    "one server twice": Wrong(
        """
engines:
  - {kind: llamacpp, url: "http://127.0.0.1:8080"}
  - {kind: llamacpp, url: "http://127.0.0.1:8080/"}
""",
        "3: engines[1]: '127.0.0.1:8080' is already the name of another engine "
        "(list each server once; to list it twice, set name:)",
    ),
    "no request would ever succeed": Wrong(
        """
engines: [{kind: scripted, failure_rate: 0.5, hang_rate: 0.5}]
""",
        "1: engines: every request would fail: the fault rates add up to 1 (use rates that add up to less than 1)",
    ),
    "a stall would never be detected": Wrong(
        """
engine_defaults: {request_timeout_s: 30}
""",
        "1: engine_defaults: stall_s is 60, above request_timeout_s (30): a stall would never be detected "
        "(use a stall_s of at most request_timeout_s)",
    ),
    "response longer than the context": Wrong(
        """
engines:
  - {kind: embedded, context_tokens: 512}
sampling: {max_new_tokens: 512}
""",
        "3: sampling.max_new_tokens: is 512: together with a prompt, this exceeds the 512 tokens of "
        "engines[0].context_tokens (use fewer new tokens or a larger context)",
    ),
    "log-probabilities of two kinds": Wrong(
        """
sampling: {temperature: 0.7}
engines:
  - {kind: llamacpp, url: "http://127.0.0.1:1", logprobs: raw}
  - {kind: llamacpp, url: "http://127.0.0.1:2"}
""",
        "2: engines: the engines give different kinds of log-probabilities, and sums uses a temperature other than "
        "1, at which they differ (use the same logprobs for all engines, or temperature 1)",
    ),
    "log-probabilities that a vLLM does not have, beside a SGLang that has them": Wrong(
        """
sampling: {temperature: 0.7, top_p: 0.9}
engines:
  - {kind: sglang, url: "http://127.0.0.1:30000"}
  - {kind: openai, url: "http://127.0.0.1:8000"}
""",
        "4: engines[1]: cannot give the log-probabilities that sums needs: after temperature 0.7 and before "
        "truncation (set logprobs: raw, or turn off top_k, top_p and min_p, or use temperature 1)",
    ),
    "log-probabilities that the engine does not have": Wrong(
        """
sampling: {temperature: 0.7, top_p: 0.9}
engines:
  - {kind: scripted}
  - {kind: embedded, context_tokens: 4096}
""",
        "4: engines[1]: cannot give the log-probabilities that sums needs: after temperature 0.7 and before "
        "truncation (set logprobs: raw, or turn off top_k, top_p and min_p, or use temperature 1)",
    ),
    # -- sources ------------------------------------------------------------------------------------------------------
    "no source": Wrong(
        """
data_sources: []
data_source_weights: []
""",
        "1: data_sources: the list is empty (expected at least 1: write [{name: …, prompts: {path: …}}])",
    ),
    "name that is no part of a path": Wrong(
        """
data_sources:
  - name: maths/hard
    prompts: {path: sums.jsonl}
""",
        "2: data_sources[0].name: 'maths/hard' cannot be a name (use 1 to 64 of "
        "A-Z a-z 0-9 _ . -, starting with a letter, a digit or _)",
    ),
    "name twice": Wrong(
        """
data_sources:
  - {name: sums, prompts: {path: sums.jsonl}}
  - {name: sums, prompts: {path: sums.jsonl}}
data_source_weights: [1, 1]
""",
        "3: data_sources[1].name: 'sums' is already the name of source 0 (names must be unique)",
    ),
    "reward that nobody knows": Wrong(
        """
data_sources:
  - name: sums
    prompts: {path: sums.jsonl}
    reward: exactmatch
""",
        "4: data_sources[0].reward: 'exactmatch' is neither a built-in reward nor a dotted path "
        "(did you mean exact_match?)",
    ),
    "reward server without an address": Wrong(
        """
data_sources:
  - name: sums
    prompts: {path: sums.jsonl}
    reward: {kind: http}
  - name: more
    prompts: {path: sums.jsonl}
    reward: {kind: http, url: "http://me:secret@judge:9000/score"}
  - name: most
    prompts: {path: sums.jsonl}
    reward: {kind: http, url: "judge:9000/score"}
  - name: last
    prompts: {path: sums.jsonl}
    reward: {kind: http, path: contains, url: "http://judge:9000/score"}
data_source_weights: [1, 1, 1, 1]
""",
        "4: data_sources[0].reward: a reward of kind http needs a url (add url: http://HOST:PORT/PATH)\n"
        "7: data_sources[1].reward.url: a URL with a user name or password would show them in logs (write "
        '"http://HOST:PORT/PATH", and use api_key_env)\n'
        "10: data_sources[2].reward.url: 'judge:9000/score' is not the URL of a server (write "
        '"http://HOST:PORT/PATH")\n'
        "13: data_sources[3].reward: path is for functions, not for a reward of kind http (remove path or "
        "kind)",
    ),
    "text alone beside tokens": Wrong(
        """
engines:
  - {kind: sglang, url: "http://a:30000"}
  - {kind: openai, url: "http://b:8000", dialect: chat}
data_sources: [{name: sums, prompts: {path: sums.jsonl}}]
data_source_weights: [1]
""",
        """
3: engines[1].dialect: chat gives only text, without token ids, but other engines of this config give tokens \
(use dialect: chat for all engines or for none)
""",
    ),
    "address of a reward without its kind": Wrong(
        """
data_sources:
  - name: sums
    prompts: {path: sums.jsonl}
    reward: {url: "http://judge:9000/score"}
  - name: more
    prompts: {path: sums.jsonl}
    reward: {timeout_s: 5}
  - name: most
    prompts: {path: sums.jsonl}
    reward: {kind: https, url: "http://judge:9000/score"}
data_source_weights: [1, 1, 1]
""",
        "4: data_sources[0].reward: url is for servers (write kind: http)\n"
        "7: data_sources[1].reward: the reward has no path (set path to one of contains, exact_match, "
        "math_verify, reasoning_gym, or package.module.f)\n"
        f'10: data_sources[2].reward.kind: got the string "https" (known kinds are {REWARDS}; '
        "did you mean http?)",
    ),
    "unknown key of a reward": Wrong(
        """
data_sources:
  - name: sums
    prompts: {path: sums.jsonl}
    reward: {path: contains, timeout: 5}
""",
        "4: data_sources[0].reward.timeout: unknown key (did you mean timeout_s?)",
    ),
    "whole groups for what scores samples": Wrong(
        """
data_sources:
  - name: sums
    prompts: {path: sums.jsonl}
    reward: {path: exact_match, group: true}
""",
        "4: data_sources[0].reward: group: true is given, but exact_match scores each sample separately "
        "(use group only for functions that score all samples of a group)",
    ),
    "reward server whose key is not there": Wrong(
        """
data_sources:
  - name: sums
    prompts: {path: sums.jsonl}
    reward: {kind: http, url: "http://judge:9000/score", api_key_env: NO_SUCH_VARIABLE}
""",
        "4: data_sources[0].reward: the environment variable NO_SUCH_VARIABLE has no key; set it, or "
        "remove api_key_env",
    ),
    "keys of files at a task, and of tasks at a file": Wrong(
        """
data_sources:
  - name: puzzles
    prompts: {path: "reasoning_gym:chain_sum", label_key: answer}
  - name: sums
    prompts: {path: sums.jsonl, size: 5, options: {min_terms: 2}}
  - name: more
    prompts: {path: "reasoning_gym:"}
data_source_weights: [1, 1, 1]
""",
        "3: data_sources[0].prompts: label_key: only for prompt files, not for reasoning_gym:chain_sum "
        "(remove it)\n"
        "5: data_sources[1].prompts: size, options: only for tasks (path: reasoning_gym:TASK), not for "
        "files (remove it)\n"
        "7: data_sources[2].prompts.path: 'reasoning_gym:' does not name a task (write reasoning_gym:TASK, "
        "such as reasoning_gym:chain_sum)",
    ),
    "prompts of an unknown kind": Wrong(
        """
data_sources:
  - name: sums
    prompts: {kind: json, path: sums.jsonl}
  - name: more
    prompts: {kind: csv, path: more.csv}
  - name: most
    prompts: {path: most.csv}
  - name: last
    prompts: {kind: reasoning_gym, path: "chain sum"}
data_source_weights: [1, 1, 1, 1]
""",
        f'3: data_sources[0].prompts.kind: got the string "json" (known kinds are {PROMPTS}; did you mean jsonl?)\n'
        f'5: data_sources[1].prompts.kind: got the string "csv" (known kinds are {PROMPTS})\n'
        "7: data_sources[2].prompts.path: most.csv: unknown suffix '.csv'; the known ones are .jsonl, "
        ".parquet (rename the file, or set kind)\n"
        "9: data_sources[3].prompts.path: 'chain sum' does not name a task (write reasoning_gym:TASK, such "
        "as reasoning_gym:chain_sum)",
    ),
    "keys and paths of one kind, named with another": Wrong(
        """
data_sources:
  - name: sums
    prompts: {kind: parquet, path: sums.parquet, size: 5}
  - name: more
    prompts: {kind: reasoning_gym, path: chain_sum, input_key: question}
    reward: {kind: builtin, path: my.rewards.score}
  - name: most
    prompts: {path: sums.jsonl}
    reward: {kind: builtin, path: exactmatch}
  - name: last
    prompts: {path: sums.jsonl}
    reward: {kind: built_in, path: contains}
data_source_weights: [1, 1, 1, 1]
""",
        "3: data_sources[0].prompts: size: only for tasks (path: reasoning_gym:TASK), not for files "
        "(remove it)\n"
        "5: data_sources[1].prompts: input_key: only for prompt files, not for chain_sum (remove it)\n"
        "6: data_sources[1].reward.path: 'my.rewards.score' is not a built-in reward (the built-in rewards "
        "are contains, exact_match, math_verify, reasoning_gym)\n"
        "9: data_sources[2].reward.path: 'exactmatch' is not a built-in reward (did you mean "
        "exact_match?)\n"
        f'12: data_sources[3].reward.kind: got the string "built_in" (known kinds are {REWARDS}; '
        "did you mean builtin?)",
    ),
    "a key of the flat form that does not go with all of its sources": Wrong(
        """
prompt_data: [sums.jsonl, "reasoning_gym:chain_sum"]
prompt_data_source_names: [sums, puzzles]
input_key: question
data_source_weights: [1, 1]
""",
        "1: prompt_data[1]: input_key: only for prompt files, not for reasoning_gym:chain_sum (remove it)",
    ),
    "sink of an unknown kind, and keys of sinks": Wrong(
        """
metrics:
  sinks:
    - {kind: tensorbord}
    - {kind: wandb, mod: offline}
    - {kind: wandb, mode: off}
""",
        """
3: metrics.sinks[0].kind: got the string "tensorbord" (known kinds are tensorboard, wandb, mlflow, trackio; did you \
mean tensorboard?)
4: metrics.sinks[1].mod: unknown key (did you mean mode?)
5: metrics.sinks[2].mode: got the string "off" (one of online, offline; did you mean offline?)
""",
    ),
    "key for a reward that returns a number": Wrong(
        """
data_sources:
  - name: sums
    prompts: {path: sums.jsonl}
    reward: {path: contains, key: score}
""",
        "4: data_sources[0].reward: key 'score' is given, but contains returns a number "
        "(use key only for functions that return a dictionary)",
    ),
    # -- weights ------------------------------------------------------------------------------------------------------
    "weights by name": Wrong(
        """
data_source_weights:
  sums: 0.5
""",
        "1: data_source_weights: expected a list, one weight for each source, in the same order; got a mapping "
        "(write [0.3, 0.7])",
    ),
    "not as many weights as sources": Wrong(
        """
data_source_weights: [0.3, 0.7]
data_source_reward_caps: [null, 0.9]
""",
        """
1: data_source_weights: 2 weights for 1 sources (write one for each source, 1 in all, in the same order)
2: data_source_reward_caps: 2 caps for 1 sources (write one for each source, 1 in all, in the same order)
""",
    ),
    "weight below zero": Wrong(
        """
data_source_weights:
  - -0.5
""",
        "2: data_source_weights[0]: the weight -0.5 is not a finite number of at least 0 "
        "(0 keeps a source out of batches)",
    ),
    "weight in quotes": Wrong(
        """
data_source_weights: ["0.5"]
""",
        '1: data_source_weights[0]: expected a weight, got the string "0.5" (remove the quotes)',
    ),
    "all weights zero": Wrong(
        """
data_source_weights: [0]
""",
        "1: data_source_weights: all weights are 0: no batch could ever be formed (at least one must be above 0)",
    ),
    # -- batches that would never come ---------------------------------------------------------------------------------
    "batch larger than what may be in flight": Wrong(
        """
rollout:
  rollout_batch_size: 32
  over_sampling_batch_size: 31
""",
        "3: rollout.over_sampling_batch_size: is 31, which is too small for a batch of 32 groups "
        "(use at least rollout_batch_size, 32, or null)",
    ),
    "filter that has nothing to judge": Wrong(
        """
rollout: {n_samples_per_prompt: 1}
dynamic_sampling_filter: check_reward_nonzero_std
""",
        "2: dynamic_sampling_filter: check_reward_nonzero_std drops every group: with n_samples_per_prompt 1 the "
        "rewards of a group cannot differ (use n_samples_per_prompt of at least 2, or null for no filter)",
    ),
    "filter that drops everything: samples that cannot differ": Wrong(
        """
sampling: {temperature: 0}
dynamic_sampling_filter: check_reward_nonzero_std
""",
        "2: dynamic_sampling_filter: check_reward_nonzero_std drops every group of sums: with temperature 0 all "
        "samples of a group are equal (use a temperature above 0 and top_k other than 1, or null for no filter)",
    ),
    "filter and cap that drop everything together": Wrong(
        """
dynamic_sampling_filter: check_reward_nonzero_std
data_source_reward_caps: [0]
""",
        "2: data_source_reward_caps[0]: a cap of 0 drops every group of sums that check_reward_nonzero_std keeps "
        "(use a cap above 0, or null for none)",
    ),
    # -- paths --------------------------------------------------------------------------------------------------------
    "state where a file stands": Wrong(
        """
run: {state_dir: sums.jsonl}
""",
        "1: run.state_dir: {here}/sums.jsonl is a file, but must be a directory (use another path)",
    ),
    "log over the prompts": Wrong(
        """
logging:
  file: ./sums.jsonl
""",
        "2: logging.file: {here}/sums.jsonl is already used as the prompts of sums "
        "(use another file, such as logs/orchestrator.jsonl)",
    ),
    # -- forms --------------------------------------------------------------------------------------------------------
    "both forms": Wrong(
        """
data_sources: [{name: sums, prompts: {path: sums.jsonl}}]
num_rollout: 200
""",
        "2: num_rollout: is a key of the flat form, but data_sources is given too "
        "(use only one form; with data_sources write rollout.num_rollout)",
    ),
    "half of the flat form": Wrong(
        """
prompt_data: [sums.jsonl]
""",
        "prompt_data_source_names: is missing (the flat form needs one name for each source)",
    ),
    "not as many names as files": Wrong(
        """
prompt_data: [sums.jsonl, sums.jsonl]
prompt_data_source_names: [sums]
data_source_weights: [1, 1]
""",
        "2: prompt_data_source_names: 1 names for 2 sources (write one for each source, 2 in all, in the same order)",
    ),
    "flat key and its section": Wrong(
        """
prompt_data: [sums.jsonl]
prompt_data_source_names: [sums]
num_rollout: 200
rollout: {num_rollout: 100}
""",
        "3: num_rollout: is given here and as rollout.num_rollout (keep only one of them)",
    ),
    "contradiction in the flat form": Wrong(
        """
prompt_data: [sums.jsonl]
prompt_data_source_names: [sums]
rollout_batch_size: 64
over_sampling_batch_size: 8
""",
        "4: over_sampling_batch_size: is 8, which is too small for a batch of 64 groups "
        "(use at least rollout_batch_size, 64, or null)",
    ),
    # -- the tokenizer -------------------------------------------------------------------------------------------------
    "tokenizer that is not there": Wrong(
        """
tokenizer: {path: gone}
""",
        "1: tokenizer: {here}/gone/tokenizer.json does not exist: "
        "give a directory that has a tokenizer.json, or the file itself",
    ),
    # -- the archive ---------------------------------------------------------------------------------------------------
    "archive where a file stands": Wrong(
        """
archive: {path: sums.jsonl}
""",
        "1: archive.path: {here}/sums.jsonl is a file, but must be a directory (use another path)",
    ),
    "archive in the state": Wrong(
        """
run: {state_dir: here}
archive: {path: here}
""",
        "2: archive.path: is the same path as run.state_dir (use another directory)",
    ),
    # -- found by looking at what the config names ---------------------------------------------------------------------
    "prompt file that is not there": Wrong(
        """
data_sources:
  - name: sums
    prompts:
      path: away.jsonl
""",
        "4: data_sources[0].prompts.path: cannot read {here}/away.jsonl: No such file or directory",
    ),
    "prompts without labels": Wrong(
        """
data_sources:
  - {name: open, prompts: {path: open.jsonl}}
""",
        "2: data_sources[0].prompts.path: row 0 has no label, which exact_match compares with: its responses could not "
        "be scored (set prompts.label_key to the key that holds it, or use a reward that needs no label)",
    ),
    "buffer below what a coming batch takes": Wrong(
        """
rollout: {rollout_batch_size: 10}
data_sources:
  - {name: sums, prompts: {path: sums.jsonl}}
  - name: more
    prompts: {path: sums.jsonl}
    buffer:
      groups: 7
data_source_weights: [1, "lambda step: min(step, 4)"]
""",
        "7: data_sources[1].buffer.groups: is 7, but the batch of step 4 needs 8 groups of more "
        "(use at least 8, or null)",
    ),
}


def write(directory: Path, text: str) -> Path:
    (directory / "sums.jsonl").write_text('{"prompt": "1+1=", "label": "2"}\n')
    (directory / "open.jsonl").write_text('{"prompt": "Tell me of the sea."}\n')
    path = directory / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("wrong", CASES.values(), ids=CASES.keys())
def test_check_says_what_is_wrong_and_where(wrong: Wrong, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, wrong.text)

    code = main(["check", str(path)])

    shown = capsys.readouterr()
    assert code == BAD_CONFIG
    assert shown.out == ""
    expected = wrong.says.strip().replace("{here}", str(tmp_path)).splitlines()
    assert shown.err.splitlines() == [f"{path}:{line}" if line[0].isdigit() else f"{path}: {line}" for line in expected]


def test_what_completes_the_cases_is_right(tmp_path: Path) -> None:
    """Else a case might be refused for another reason than its own."""
    assert main(["check", str(write(tmp_path, Wrong("", "").text))]) == 0


def test_all_problems_are_named_in_the_order_of_their_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = ["below its bound", "URL with a path", "weights by name", "none of the choices"]
    merged = "\n".join(CASES[part].yaml.replace("rollout:\n  failed_sample: drop\n", "") for part in parts)
    assert main(["check", str(write(tmp_path, Wrong(merged, "").text))]) == BAD_CONFIG
    lines = [int(line.split(".yaml:")[1].split(":")[0]) for line in capsys.readouterr().err.splitlines()]
    assert len(lines) == 6
    assert lines == sorted(lines)
