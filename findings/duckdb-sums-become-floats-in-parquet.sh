#!/usr/bin/env bash
# Package:   duckdb 2.0.1, files read back by pyarrow 26.0.1
# Guess:     integers stay integers in Parquet; one that does not fit 64 bits is an error or a decimal.
# Behaviour: sum() of integers is a HUGEINT, and COPY … TO Parquet writes HUGEINT as a double, without a warning: sums of
#            token counts and large ids come back rounded, and as floats also where they are small.
# Seen:      sum(tokens) 9007199254740993 became 9007199254740992.0; sum of 1, 2, 3 became 6.0
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-python3}
"$python" -m pip install --quiet --no-compile --disable-pip-version-check --target "$work/lib" \
    duckdb==2.0.1 pyarrow==26.0.1 2> "$work/log" || { cat "$work/log" >&2; exit 1; }
PYTHONPATH=$work/lib timeout 120 "$python" -B - <<'PYTHON'
import os
import tempfile

import duckdb
import pyarrow.parquet

with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, "sums.parquet")
    query = "select sum(tokens) as large, sum(small) as small from (values (9007199254740992, 1), (1, 5)) as t(tokens, small)"
    exact = duckdb.sql(query).fetchall()[0]
    duckdb.sql(f"copy ({query}) to '{path}'")
    table = pyarrow.parquet.read_table(path)
print(f"in duckdb: {exact}; in the file: {table.to_pylist()[0]} of types {[str(kind) for kind in table.schema.types]}")
assert exact == (9007199254740993, 6)
assert table.to_pylist() == [{"large": 9007199254740992.0, "small": 6.0}]
assert [str(kind) for kind in table.schema.types] == ["double", "double"]
PYTHON
