#!/usr/bin/env bash
# Package:   tokenizers 0.23.3
# Guess:     the ids in tokenizer.json are the ids one gets, and get_vocab_size() is the highest id plus one.
# Behaviour: an added token whose id leaves a gap behind the model's vocabulary gets the next free id instead, silently;
#            the embedding's row for the id in the file is never used. In the model's own vocabulary gaps are kept, and
#            get_vocab_size() counts entries: valid ids lie beyond it.
# Seen:      written with id 100, loaded with id 3; a vocabulary with ids 0, 1, 5000 has size 3
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-python3}
"$python" -m pip install --quiet --no-compile --disable-pip-version-check --target "$work/lib" \
    tokenizers==0.23.3 2> "$work/log" || { cat "$work/log" >&2; exit 1; }
PYTHONPATH=$work/lib timeout 120 "$python" -B - <<'PYTHON'
import json

from tokenizers import Tokenizer, models

tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
tokenizer.add_special_tokens(["<|end|>"])
described = json.loads(tokenizer.to_str())
described["added_tokens"][0]["id"] = 100
loaded = Tokenizer.from_str(json.dumps(described)).encode("<|end|>").ids
gaps = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1, "z": 5000}, unk_token="[UNK]"))
sizes = gaps.get_vocab_size(), gaps.token_to_id("z")
print(f"<|end|> is 100 in the file and {loaded[0]} when loaded; size {sizes[0]} with a highest id of {sizes[1]}")
assert loaded == [3] and sizes == (3, 5000)
PYTHON
