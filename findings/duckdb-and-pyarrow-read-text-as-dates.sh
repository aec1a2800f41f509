#!/usr/bin/env bash
# Package:   duckdb 2.0.1, pyarrow 26.0.1 (polars 2.1.0 for comparison)
# Guess:     a JSON string stays a string; only CSV has its types guessed.
# Behaviour: a column of JSON strings that all look like ISO dates becomes DATE in duckdb (and TIME, UUID likewise) and
#            timestamp[s] in pyarrow.json. Converting prompts from JSONL to Parquet so changes labels: pyarrow's text is
#            '2024-01-02 00:00:00'. polars keeps the text.
# Seen:      duckdb DATE, pyarrow timestamp[s] (as text '2024-01-02 00:00:00'), polars String
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-python3}
"$python" -m pip install --quiet --no-compile --disable-pip-version-check --target "$work/lib" \
    duckdb==2.0.1 pyarrow==26.0.1 polars==2.1.0 2> "$work/log" || { cat "$work/log" >&2; exit 1; }
PYTHONPATH=$work/lib timeout 120 "$python" -B - <<'PYTHON'
import io

import duckdb
import polars
import pyarrow.json
import tempfile

row = b'{"prompt": "When?", "label": "2024-01-02", "time": "12:30:00"}\n'
with tempfile.NamedTemporaryFile(suffix=".jsonl") as file:
    file.write(row)
    file.flush()
    by_duckdb = {name: kind for name, kind, *_ in duckdb.sql(f"describe select * from '{file.name}'").fetchall()}
by_pyarrow = pyarrow.json.read_json(io.BytesIO(row))
text = by_pyarrow["label"].cast(pyarrow.string())[0].as_py()
by_polars = polars.read_ndjson(row)
print(f"duckdb: {by_duckdb}")
print(f"pyarrow: {by_pyarrow.schema.field('label').type}, as text {text!r}")
print(f"polars: {by_polars.schema['label']}, {by_polars['label'][0]!r}")
assert by_duckdb == {"prompt": "VARCHAR", "label": "DATE", "time": "TIME"}
assert str(by_pyarrow.schema.field("label").type) == "timestamp[s]" and text == "2024-01-02 00:00:00"
assert by_polars["label"][0] == "2024-01-02"
PYTHON
