#!/usr/bin/env bash
# Package:   xllamacpp 2026.10.11549 (llama.cpp's server), model made with gguf 0.19.0
# Guess:     tokens_cached counts the prompt's tokens that were found in the cache, tokens_evaluated those that were not.
# Behaviour: tokens_cached is what the cache holds afterwards (prompt + response - 1), also on a server that never saw a
#            request; tokens_evaluated is the whole prompt, also where it was cached. Hits are in timings.cache_n.
# Seen:      first request of 5 + 4 tokens: tokens_cached 8, tokens_evaluated 5, cache_n 0; again: 8, 5, cache_n 4
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
    seen = []
    for _ in range(2):
        answer = ask("/completion", {"prompt": "hello", "n_predict": 4, "temperature": 0})[1]
        seen.append((answer["tokens_cached"], answer["tokens_evaluated"], answer["timings"]["cache_n"]))
        print("tokens_cached {}, tokens_evaluated {}, timings.cache_n {}".format(*seen[-1]))
    assert seen == [(8, 5, 0), (8, 5, 4)]


with_server(check)
PYTHON
