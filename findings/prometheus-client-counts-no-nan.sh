#!/usr/bin/env bash
# Package:   prometheus-client 0.26.0
# Guess:     a NaN that a histogram observes is refused, or falls into the +Inf bucket and is counted.
# Behaviour: it falls into no bucket, so the count stays, but it is added to the sum, which is NaN until the process ends:
#            one undefined reward makes every later mean NaN, and no count says how many there were.
# Seen:      after 1.0, NaN, 3.0: count 2, sum NaN, +Inf bucket 2
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-python3}
"$python" -m pip install --quiet --no-compile --disable-pip-version-check --target "$work/lib" \
    prometheus-client==0.26.0 2> "$work/log" || { cat "$work/log" >&2; exit 1; }
PYTHONPATH=$work/lib timeout 120 "$python" -B - <<'PYTHON'
import math

from prometheus_client import CollectorRegistry, Histogram

registry = CollectorRegistry()
histogram = Histogram("reward", "of a sample", buckets=[2.0], registry=registry)
for value in (1.0, math.nan, 3.0):
    histogram.observe(value)
count, total = registry.get_sample_value("reward_count"), registry.get_sample_value("reward_sum")
last = registry.get_sample_value("reward_bucket", {"le": "+Inf"})
print(f"three observed, one of them NaN: count {count}, sum {total}, +Inf bucket {last}")
assert count == last == 2 and math.isnan(total)
PYTHON
