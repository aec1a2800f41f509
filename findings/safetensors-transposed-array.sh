#!/usr/bin/env bash
# Package:   safetensors 0.8.0 (safetensors.numpy), numpy 2.4.6
# Guess:     save() writes the array that it is given, or refuses one that is not contiguous, as it does for torch.
# Behaviour: a transposed, Fortran-ordered or strided array is written in the order of its memory under its logical
#            shape: other numbers come back, without an error. np.ascontiguousarray() before save() avoids it.
# Seen:      saved [[0, 3], [1, 4], [2, 5]], loaded [[0, 1], [2, 3], [4, 5]]; every second column: 0 2 3 5 became 0 1 2 3
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-python3}
"$python" -m pip install --quiet --no-compile --disable-pip-version-check --target "$work/lib" \
    safetensors==0.8.0 numpy==2.4.6 2> "$work/log" || { cat "$work/log" >&2; exit 1; }
PYTHONPATH=$work/lib timeout 120 "$python" -B - <<'PYTHON'
import numpy as np
from safetensors.numpy import load, save

kept = np.arange(6, dtype=np.float32).reshape(2, 3)
changed = []
for name, array in {"contiguous": kept, "transposed": kept.T, "Fortran order": np.asfortranarray(kept), "strided": kept[:, ::2]}.items():
    loaded = load(save({"x": array}))["x"]
    print(f"{name}: saved {array.tolist()}, loaded {loaded.tolist()}")
    if not np.array_equal(array, loaded):
        changed.append(name)
assert changed == ["transposed", "Fortran order", "strided"], changed
PYTHON
