#!/usr/bin/env bash
# Package:   mlflow-skinny 3.17.2, runs kept in a directory
# Guess:     a metric may have the name that other trackers take, eval/aime/pass@8; one bad name costs that metric.
# Behaviour: @ is refused, and in log_batch the whole batch with it. In a directory a name cannot be another one's parent
#            either: after 'eval', 'eval/mean' is a NotADirectoryError.
# Seen:      MlflowException for pass@8, nothing of the batch kept; NotADirectoryError
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-python3}
"$python" -m pip install --quiet --no-compile --disable-pip-version-check --target "$work/lib" \
    mlflow-skinny==3.17.2 2> "$work/log" || { cat "$work/log" >&2; exit 1; }
PYTHONPATH=$work/lib timeout 120 "$python" -B - <<'PYTHON'
import os
import tempfile
import time

os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException

with tempfile.TemporaryDirectory() as folder:
    client = MlflowClient(f"file://{folder}")
    run = client.create_run(client.create_experiment("e")).info.run_id
    now = int(time.time() * 1000)
    try:
        client.log_batch(run, metrics=[Metric("eval/aime/mean", 0.5, now, 1), Metric("eval/aime/pass@8", 0.9, now, 1)])
        refused = None
    except MlflowException as error:
        refused = str(error).splitlines()[0]
    kept = client.get_run(run).data.metrics
    client.log_metric(run, "eval", 1.0)
    try:
        client.log_metric(run, "eval/mean", 0.5)
        nested = None
    except OSError as error:
        nested = type(error).__name__
print(f"pass@8: {refused}\nkept of that batch: {kept}\n'eval/mean' after 'eval': {nested}")
assert refused and "pass@8" in refused and kept == {} and nested == "NotADirectoryError"
PYTHON
