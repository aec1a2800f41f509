#!/usr/bin/env bash
# Package:   xllamacpp 2026.10.11549 (llama.cpp's server), model made with gguf 0.19.0
# Guess:     presence_penalty and frequency_penalty count generated tokens only, as OpenAI and vLLM have it: they cannot
#            change the first token.
# Behaviour: they count the last 64 tokens, the prompt's included. A long prompt forbids its own words from the start.
# Seen:      after 'aaaaaaaaaa' the first token is 'a' with p = 0.159; presence_penalty 1.5: 0.040; frequency 1.5: 6e-08
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
    def first_token(**penalty):
        body = {"prompt": "aaaaaaaaaa", "n_predict": 1, "n_probs": 259, "post_sampling_probs": True, "seed": 1}
        body |= {"temperature": 1.0, "samplers": ["penalties", "temperature"]} | penalty
        found = ask("/completion", body)[1]["completion_probabilities"][0]["top_probs"]
        return next((entry["prob"] for entry in found if entry["id"] == ord("a")), 0.0)

    plain, presence, frequency = first_token(), first_token(presence_penalty=1.5), first_token(frequency_penalty=1.5)
    print(f"p('a') of the first token: {plain:.3f}; presence_penalty: {presence:.3f}; frequency_penalty: {frequency:.2g}")
    assert plain > 0.1 and presence < plain / 2 and frequency < 1e-5


with_server(check)
PYTHON
