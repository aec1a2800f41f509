#!/usr/bin/env bash
# Package:   math-verify 0.9.0
# Guess:     answers that are words or hexadecimal numbers are compared as text, or cannot be read.
# Behaviour: inside $…$ or \boxed{…} a word is the product of its letters, so anagrams are equal, and 0x1f is 0·x·1·f, so
#            all hexadecimal numbers are equal (outside of LaTeX too: each is read as 0). Tasks of reasoning-gym have such
#            answers: in spell_backward the word copied as it is, in bitwise_arithmetic any other number scores 1.
# Seen:      'stop' = 'pots' True, 0x5b993 = 0x4d0efa34 True, 0xff = 255 False
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-python3}
"$python" -m pip install --quiet --no-compile --disable-pip-version-check --target "$work/lib" \
    math-verify[antlr4_13_2]==0.9.0 2> "$work/log" || { cat "$work/log" >&2; exit 1; }
PYTHONPATH=$work/lib timeout 120 "$python" -B - <<'PYTHON'
from math_verify import parse, verify

PAIRS = [("$stop$", r"\boxed{pots}"), ("$0x5b993$", r"\boxed{0x4d0efa34}"), ("0x5b993", "It is 0x4d0efa34."), ("$0xff$", "$255$")]
seen = []
for gold, answer in PAIRS:
    read = [parse(text, parsing_timeout=None) for text in (gold, answer)]  # its own timeouts go by the clock
    seen.append(verify(*read, timeout_seconds=None))
    print(f"{gold} = {answer}: {seen[-1]}, read as {read[0][0]} and {read[1][0]}")
assert seen == [True, True, True, False]
PYTHON
