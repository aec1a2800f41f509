#!/usr/bin/env bash
# Package:   prometheus-client 0.26.0
# Guess:     Gauge('rollout/math/weight') raises ValueError, as it did for years; or the name is written in quotes.
# Behaviour: any name is taken, and generate_latest() writes all that is no letter, digit or colon as an underscore. Names
#            that differ only there pass the check for duplicates and come out as one series with two values.
# Seen:      'math/v1' and 'math.v1' give 'math_v1 1.0' and 'math_v1 2.0', each with its own # TYPE line
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-python3}
"$python" -m pip install --quiet --no-compile --disable-pip-version-check --target "$work/lib" \
    prometheus-client==0.26.0 2> "$work/log" || { cat "$work/log" >&2; exit 1; }
PYTHONPATH=$work/lib timeout 120 "$python" -B - <<'PYTHON'
from prometheus_client import CollectorRegistry, Gauge, generate_latest

registry = CollectorRegistry()
Gauge("math/v1", "a source", registry=registry).set(1)
Gauge("math.v1", "another source", registry=registry).set(2)
text = generate_latest(registry).decode()
print(text)
samples = [line for line in text.splitlines() if not line.startswith("#")]
assert samples == ["math_v1 1.0", "math_v1 2.0"] and text.count("# TYPE math_v1 gauge") == 2
PYTHON
