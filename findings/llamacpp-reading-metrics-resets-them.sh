#!/usr/bin/env bash
# Package:   xllamacpp 2026.10.11549 (llama.cpp's server), model made with gguf 0.19.0
# Guess:     GET /metrics only reads: two readers (Prometheus and a daemon's health check) see the same figures.
# Behaviour: the gauges prompt_tokens_seconds and predicted_tokens_seconds cover the time since the last read and are set
#            to 0 by it. With two readers each sees a part, or 0. The counters *_total and *_seconds_total are unharmed.
# Seen:      predicted_tokens_seconds some thousand at the first read, 0 at the second; tokens_predicted_total 4 and 4
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
    ask("/completion", {"prompt": "hello", "n_predict": 4})

    def read():
        lines = [line.split() for line in ask("/metrics")[1].splitlines() if not line.startswith("#")]
        return {name.removeprefix("llamacpp:"): float(value) for name, value in lines}

    first, second = read(), read()
    for name in ("tokens_predicted_total", "predicted_tokens_seconds", "prompt_tokens_seconds"):
        print(f"{name}: {first[name]:g}, read again: {second[name]:g}")
    assert first["tokens_predicted_total"] == second["tokens_predicted_total"] == 4
    for name in ("predicted_tokens_seconds", "prompt_tokens_seconds"):
        assert first[name] > 0 and second[name] == 0


with_server(check)
PYTHON
