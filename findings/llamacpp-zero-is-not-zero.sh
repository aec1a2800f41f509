#!/usr/bin/env bash
# Package:   xllamacpp 2026.10.11549 (llama.cpp's server), model made with gguf 0.19.0
# Guess:     as in OpenAI's and vLLM's /v1/completions: max_tokens 0 generates nothing (to score or to warm a prompt),
#            logprobs 0 gives the log-probability of each token drawn, without alternatives.
# Behaviour: max_tokens 0 (and n_predict 0) generates one token; logprobs 0 gives none at all. Both with 200.
# Seen:      max_tokens 0: completion_tokens 1; logprobs 0: null; logprobs 1: one entry a token
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-python3}
"$python" -m pip install --quiet --no-compile --disable-pip-version-check --target "$work/lib" \
    xllamacpp==2026.10.11549 gguf==0.19.0 numpy==2.4.6 2> "$work/log" || { cat "$work/log" >&2; exit 1; }
export TMPDIR=$work PYTHONPATH=$work/lib:${0%/*}
timeout 120 "$python" -B - 2> "$work/log" <<'PYTHON' || { tail -n 20 "$work/log" >&2; exit 1; }
from _tiny_llama import with_server


def check(ask):
    def complete(**options):
        status, answer = ask("/v1/completions", {"prompt": "hello", "temperature": 0, **options})
        assert status == 200, answer
        return answer

    none = complete(max_tokens=0)["usage"]["completion_tokens"]
    native = ask("/completion", {"prompt": "hello", "n_predict": 0})[1]["tokens_predicted"]
    zero = complete(max_tokens=2, logprobs=0)["choices"][0]["logprobs"]
    one = complete(max_tokens=2, logprobs=1)["choices"][0]["logprobs"]["content"]
    print(f"max_tokens 0: {none} token; n_predict 0: {native} token; logprobs 0: {zero}; logprobs 1: {len(one)} entries")
    assert (none, native, zero, len(one)) == (1, 1, None, 2)


with_server(check)
PYTHON
