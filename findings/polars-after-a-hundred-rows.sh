#!/usr/bin/env bash
# Package:   polars 2.1.0
# Guess:     rows given as dictionaries make a frame with all of their keys, and a float among integers makes the column
#            a float column (or raises).
# Behaviour: the first 100 rows fix keys and types (infer_schema_length=100). From row 101 on a new key is dropped and
#            2.5 in a column of integers becomes 2, silently. infer_schema_length=None reads all rows.
# Seen:      100 rewards of 0 and one of 2.5: [0, 2]; a label that only row 101 has: columns ['prompt']
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-python3}
"$python" -m pip install --quiet --no-compile --disable-pip-version-check --target "$work/lib" \
    polars==2.1.0 2> "$work/log" || { cat "$work/log" >&2; exit 1; }
PYTHONPATH=$work/lib timeout 120 "$python" -B - <<'PYTHON'
import polars

rewards = [{"reward": 0}] * 100 + [{"reward": 2.5}]
labels = [{"prompt": "p"}] * 100 + [{"prompt": "q", "label": "7"}]
cut = polars.from_dicts(rewards)["reward"].unique().sort().to_list()
whole = polars.from_dicts(rewards, infer_schema_length=None)["reward"].unique().sort().to_list()
early = polars.from_dicts(rewards[1:])["reward"].unique().sort().to_list()
columns = polars.from_dicts(labels).columns
print(f"rewards: {cut}; after 99 rows instead of 100: {early}; with infer_schema_length=None: {whole}")
print(f"columns of rows of which the 101st has a label: {columns}")
assert (cut, early, whole, columns) == ([0, 2], [0.0, 2.5], [0.0, 2.5], ["prompt"])
PYTHON
