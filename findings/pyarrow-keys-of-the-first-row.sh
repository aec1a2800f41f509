#!/usr/bin/env bash
# Package:   pyarrow 26.0.1
# Guess:     Table.from_pylist() makes a column of every key that any row has, as pa.array() does for structs.
# Behaviour: the columns are the keys of the first row. What later rows have beside them is dropped without a word; one
#            level deeper, in a struct, the union of the keys is taken.
# Seen:      [{'prompt': 'a'}, {'prompt': 'b'}] where the second row had a label; nested: {'level': None, 'split': 'x'}
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-python3}
"$python" -m pip install --quiet --no-compile --disable-pip-version-check --target "$work/lib" \
    pyarrow==26.0.1 2> "$work/log" || { cat "$work/log" >&2; exit 1; }
PYTHONPATH=$work/lib timeout 120 "$python" -B - <<'PYTHON'
import pyarrow

table = pyarrow.Table.from_pylist([{"prompt": "a"}, {"prompt": "b", "label": "7"}]).to_pylist()
nested = pyarrow.Table.from_pylist([{"metadata": {"split": "x"}}, {"metadata": {"level": 3}}]).to_pylist()
print(f"table: {table}")
print(f"nested: {nested}")
assert table == [{"prompt": "a"}, {"prompt": "b"}]
assert nested[0]["metadata"] == {"split": "x", "level": None}
PYTHON
