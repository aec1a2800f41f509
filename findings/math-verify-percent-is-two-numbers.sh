#!/usr/bin/env bash
# Package:   math-verify 0.9.0
# Guess:     equality is transitive: 50% is 0.5, and so it is not 50.
# Behaviour: 50% equals 50 and equals 0.5, in both directions, while 50 does not equal 0.5. A gold answer in percent
#            accepts an answer that is wrong by a factor of 100; counts of equal answers (majority votes) depend on order.
# Seen:      50 = 50% True, 50% = 0.5 True, 50 = 0.5 False
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-python3}
"$python" -m pip install --quiet --no-compile --disable-pip-version-check --target "$work/lib" \
    math-verify[antlr4_13_2]==0.9.0 2> "$work/log" || { cat "$work/log" >&2; exit 1; }
PYTHONPATH=$work/lib timeout 120 "$python" -B - <<'PYTHON'
from math_verify import parse, verify

seen = []
for gold, answer in [("50", r"50\%"), (r"50\%", "50"), (r"50\%", "0.5"), ("0.5", r"50\%"), ("50", "0.5")]:
    read = [parse(f"${text}$", parsing_timeout=None) for text in (gold, answer)]  # its own timeouts go by the clock
    seen.append(verify(*read, timeout_seconds=None))
    print(f"{gold} = {answer}: {seen[-1]}")
assert seen == [True, True, True, True, False]
PYTHON
